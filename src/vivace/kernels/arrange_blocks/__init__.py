"""Tokens into blocks and back, with the blocks' means in the same pass; see `spec`."""
