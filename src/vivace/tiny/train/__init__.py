"""Training, evaluation and export of the embedded model; run `python -m vivace.tiny.train --help`."""
