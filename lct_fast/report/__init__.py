"""Reports over run folders: read them, compare them in one HTML file, draw their learning curves."""

from lct_fast.report.curves import plot_curves
from lct_fast.report.page import write
from lct_fast.report.run import Run, read_run

__all__ = ["Run", "plot_curves", "read_run", "write"]
