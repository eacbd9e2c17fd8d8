"""`python -m fastfip` is `fastfip`."""

import sys

from fastfip.cli import main

if __name__ == "__main__":
    sys.exit(main())
