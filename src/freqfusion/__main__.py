"""``python -m freqfusion`` is the command ``freqfusion``."""

import sys

from freqfusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
