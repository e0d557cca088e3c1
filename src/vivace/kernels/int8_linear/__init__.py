"""Linear layers with 8-bit integer weights; see `spec`."""
