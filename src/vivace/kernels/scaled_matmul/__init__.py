"""Products of 8-bit matrices with scales, and what stands behind a linear layer in the same pass; see `spec`."""
