"""`python -m vivace` is the same as `vivace`."""

import sys

from vivace.cli.main import main

sys.exit(main())
