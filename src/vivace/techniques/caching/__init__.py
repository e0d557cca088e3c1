"""Techniques of the family: caching."""
