"""`python -m mezo` is the `mezo` command."""

import sys

from mezo.cli.main import main

if __name__ == "__main__":  # processes that an engine spawns import this module again
    sys.exit(main())
