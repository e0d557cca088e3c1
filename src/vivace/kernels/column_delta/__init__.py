"""Attention of blocks of queries over single keys, and what it changes in a remembered result; see `spec`."""
