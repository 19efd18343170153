"""``python -m capgen_utils`` is ``capgen``."""

import sys

from capgen_utils.apps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
