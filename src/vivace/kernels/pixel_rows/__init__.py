"""Norm and SiLU, residuals and doubling between the convolutions of a video decoder; see `spec`."""
