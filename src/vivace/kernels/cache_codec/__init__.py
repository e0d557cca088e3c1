"""Keys, values and remembered features in few bits; see `spec`."""
