"""Rows to 8 bits, with what stands before a linear layer in the same pass; see `spec`."""
