"""`python -m benchmarks.pipeline`."""

import sys

from benchmarks.pipeline.command import main

if __name__ == "__main__":
    sys.exit(main())
