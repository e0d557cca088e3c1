"""Attention over all pairs, by any of several vendors; see `spec`."""
