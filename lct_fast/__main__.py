"""python -m lct_fast."""

import sys

from lct_fast.cli import main

sys.exit(main())
