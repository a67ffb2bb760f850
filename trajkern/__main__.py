"""``python -m trajkern``: the command line."""

import sys

from trajkern.cli import main

sys.exit(main())
