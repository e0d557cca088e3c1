"""Techniques of the family: trajectory."""
