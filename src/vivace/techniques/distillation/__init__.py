"""Techniques of the family: distillation."""
