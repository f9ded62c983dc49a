"""`python -m benchmarks.gpu`."""

import sys

from benchmarks.gpu.command import run

if __name__ == "__main__":
    sys.exit(run())
