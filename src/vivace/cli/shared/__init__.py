"""What the commands share: options, the screen, output files, and one run of a model with its progress bar."""
