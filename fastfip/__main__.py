"""`python -m fastfip` is `fastfip`."""

import os
import sys

# `python -m` puts the working folder first, where a downloaded folder may hold a module with the name of a dependency.
# Where it is needed, for the user's own architecture, it is searched last.
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from fastfip.cli import main

if __name__ == "__main__":
    sys.exit(main())
