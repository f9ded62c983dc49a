"""For tests of the GPU command: time that passes when told to, and processes that ought to be gone."""

import time
from pathlib import Path


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def runs(process: int) -> bool:
    """Whether a process runs; one that is ending has ten seconds for it."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True
