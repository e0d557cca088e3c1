"""Linear layers with quantised weights and activations; see `spec`."""
