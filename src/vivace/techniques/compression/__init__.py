"""Techniques of the family: compression."""
