"""The command line: one thin file per command, what they share in `shared`. Nothing here imports torch at the top."""
