"""``python -m capgen_utils`` is ``capgen``."""

import sys

from capgen_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
