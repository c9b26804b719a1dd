"""`python -m mezo` is the `mezo` command."""

import sys

from mezo.cli import main

sys.exit(main())
