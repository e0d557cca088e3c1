"""From scores of block pairs to lists of key blocks, in one pass; see `spec`."""
