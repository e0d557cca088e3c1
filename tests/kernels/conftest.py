"""Triton kernels run in its interpreter where there is no GPU; that is decided before they are imported."""

from vivace.testing.interpreter import interpret

WHY_NOT = interpret()
