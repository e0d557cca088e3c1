"""Techniques, one file each, in the four families of the survey (distillation, attention, compression, caching) and
trajectory.
"""
