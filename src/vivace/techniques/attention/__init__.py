"""Techniques of the family: attention."""
