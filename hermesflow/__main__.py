"""`python -P -m hermesflow`, the same as the `hermesflow` command."""

import sys

from hermesflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
