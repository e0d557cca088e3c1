"""Techniques, one file each, in the survey's four families (distillation, attention, compression, caching) plus trajectory."""
