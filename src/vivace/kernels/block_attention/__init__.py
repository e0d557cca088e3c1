"""Attention over lists of key blocks that may change with every call; see `spec`."""
