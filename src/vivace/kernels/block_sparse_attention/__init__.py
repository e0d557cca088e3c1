"""Attention restricted to a static map of blocks; see `spec`."""
