"""Samples and faults are third parties': found on the path by their names, as another process finds them too."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "faults")]
