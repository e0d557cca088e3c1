"""Attention with 8-bit products, dense or over lists of key blocks; see `spec`."""
