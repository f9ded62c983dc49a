"""Writes checkpoints behind the training loop's back: one at a time, errors told to the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

# Seconds after which who waits says so.
_TURN = 0.1


class Writer:
    """Runs one job at a time in a thread. The interpreter does not end before its job is done.

    Args:
        waiting: called every tenth of a second while the training loop waits here; may raise to end that.
    """

    def __init__(self, waiting: Callable[[], None]) -> None:
        self._waiting = waiting
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Runs ``job`` once the one before it is done. Raises what that one raised."""
        self.finish()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer")
        self._thread.start()

    def check(self) -> None:
        """Raises what a job raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Waits until nothing is being written. Raises what a job raised."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_TURN)
            self._waiting()
        self._thread = None
        self.check()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
