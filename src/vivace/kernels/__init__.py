"""Kernels: one folder per operation, a torch reference beside every fast implementation."""
