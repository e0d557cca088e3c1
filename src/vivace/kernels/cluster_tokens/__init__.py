"""k-means of tokens, per sample and head; see `spec`."""
