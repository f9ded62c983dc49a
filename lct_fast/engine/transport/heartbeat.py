"""Beats of every rank's training loop in the rendezvous store, and the end of a run whose rank does not beat.

The training loop counts its turns, also while it waits. A thread of each process forwards the counters to the store,
a few times a second, and looks at the others': a rank that was killed, stopped or hangs is noticed by all others, and
all end with one message that names it. A process that fails posts its own reason first.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from lct_fast.engine.errors import PeerError, first_line
from lct_fast.engine.transport.watch import Beat, Phase, Report, Watch, root_cause

# Seconds: between two looks at most; with trouble about; for a lost rank to tell its own reason; for the training loop
# to end on its own. Those of SIGTERM stay far below the 30 s after which torchrun kills.
_INTERVAL, _QUICK, _GRACE, _LEAVE = 0.5, 0.1, 2.0, 2.0

_active: list[Heartbeat] = []


def report(error: BaseException) -> None:
    """Tells the other ranks why this process is about to end; nothing where no run over processes goes on."""
    for heart in list(_active):
        heart.report(error)


class Heartbeat:
    """This process's beats and its watch over the others'. The thread ends with ``close``.

    Args:
        store: torch.distributed's, under a prefix of this run; used from the thread only.
        rank: this process's, among all.
        groups: K; rank r trains the group of index r % K.
        places: of every rank "host, device, process id".
        start_timeout, step_timeout: seconds that a training loop may stand still before and after its first batch.
        leave: ends the process.

    Attributes:
        newest: finds the newest whole checkpoint.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        groups: int,
        places: Sequence[str],
        start_timeout: float,
        step_timeout: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.groups, self.places = rank, groups, list(places)
        self.newest: Callable[[], Path | None] = lambda: None
        self._store: Any = store
        self._leave = leave
        self._interval = min(_INTERVAL, step_timeout / 8)
        self._pause, self._step_timeout = max(2.0, 4 * self._interval), step_timeout
        self._judge = Watch(rank, len(places), start_timeout, step_timeout, time.monotonic(), self._pause)
        # What the training loop saw of the thread: its passes, when, and for how long it has made none.
        self._seen, self._checked, self._stuck = 0, time.monotonic(), 0.0
        self._turns = self._work = self._alive = 0
        self._phase, self._batch, self._waits = Phase.STARTING, -1, ""
        # Whether this process depends on the others: in the stream, and in what all do together behind it.
        self._watching = True
        self._outgoing: list[Report] = []
        self._posted, self._settled = threading.Event(), threading.Event()
        self._cause = ""
        self._told = self._closing = self._terminated = False
        self._trouble: float | None = None
        self._deadline = 0.0
        self._main = threading.get_ident()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._listen_for_sigterm()
        _active.append(self)
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    # What the training loop says.

    def beat(self) -> None:
        """The training loop goes on.

        Raises:
            PeerError: the run is over; names the cause.
        """
        self._turns += 1
        self._work += 1
        self._waits = ""
        self._check()

    def wait(self, what: str) -> None:
        """The training loop still waits, for ``what``. Raises as ``beat``."""
        self._turns += 1
        self._waits = what
        self._check()

    def done(self, batch: int) -> None:
        """``batch`` is done: from the first one on ``step_timeout`` counts. Raises as ``beat``."""
        self._batch = batch
        if self._phase is Phase.STARTING:
            self._phase = Phase.RUNNING
            self._stir()
        self.beat()

    def end(self) -> None:
        """The stream has ended: nobody waits for this loop any more, nor this process for another's."""
        self._phase, self._watching = Phase.ENDING, False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do together. Raises PeerError, which names the cause, where another rank is lost."""
        before, self._watching = self._watching, True
        try:
            yield
        except RuntimeError as error:
            raise self.verdict(f"a process was lost ({_short(error)}): see its own error") from None
        finally:
            self._watching = before

    def lost(self, peer: int, error: BaseException) -> None:
        """The link to ``peer`` broke; from any thread."""
        batch = self._judge.beats[peer].batch
        self._outgoing.append(Report(self.rank, batch, f"is gone ({_short(error)})", peer))
        self._stir()

    def verdict(self, otherwise: str) -> PeerError:
        """The error to raise where a peer is lost: waits, for seconds at most, until the cause is known."""
        self._told = True
        self._settled.wait(_GRACE + _LEAVE)
        return PeerError(self._cause or otherwise)

    def report(self, error: BaseException) -> None:
        """Tells the others that this process ends by ``error``, unless it only passes on what it heard."""
        told, self._told = self._told, True
        if told or self._settled.is_set():
            return
        why = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        self._posted.clear()
        self._outgoing.append(Report(self.rank, self._batch, f"ended by {why}{_where(error)}"))
        self._stir()
        self._posted.wait(_GRACE)

    def close(self) -> None:
        """Ends the thread, which must not outlive the interpreter."""
        atexit.unregister(self.close)
        if self in _active:
            _active.remove(self)
        self._closing = True
        self._stir()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LEAVE)
        self._deafen()

    def _check(self) -> None:
        self._watch_the_thread(time.monotonic())
        if self._settled.is_set() and not self._told:
            self._told = True
            raise PeerError(self._cause)

    def _watch_the_thread(self, now: float) -> None:
        """A launcher that is stopped, or out of reach, answers nothing and breaks nothing: the thread waits for it."""
        passed, self._seen = self._seen != self._alive, self._alive
        self._stuck = 0.0 if passed else self._stuck + min(now - self._checked, self._pause)
        self._checked = now
        if self._stuck > self._step_timeout and self._watching and not self._settled.is_set():
            self._settle(f"{self._holder()} has not answered for {self._stuck:.0f} s")

    # The thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._look(time.monotonic())
                self._sleep(_QUICK if self._trouble is not None else self._interval)
            # The last beat says that the stream has ended.
            self._send_beat()
        except RuntimeError as error:
            if self._watching and not self._closing:
                self._settle(f"{self._holder()} is gone: the rendezvous store was lost ({_short(error)})")
        while not self._closing and self._settled.is_set():
            self._end_late(time.monotonic())
            self._sleep(_QUICK)

    def _look(self, now: float) -> None:
        """One pass: tell, read, judge."""
        self._send_beat()
        while self._outgoing:
            self._post(self._outgoing.pop(0))
        reports = self._reports()
        if self._watching and not self._settled.is_set():
            standing = self._judge.look(self._read_beats(), now)
            # Of oneself one says it also where others have said it first: with the line.
            new = not reports or (standing is not None and standing.accuses is None)
            if standing is not None and new and not self._posted.is_set() and not self._told:
                self._post(self._with_place(standing))
                reports = self._reports()
        if self._terminated or (reports and self._watching):
            self._trouble = now if self._trouble is None else self._trouble
        if self._trouble is not None and not self._settled.is_set():
            patient = self._watching and now - self._trouble < _GRACE
            cause = root_cause(reports, patient)
            if cause is not None:
                self._settle(self._message(cause, reports))
            elif not patient:
                self._settle(f"{self._name(self.rank)} was ended by SIGTERM; no rank has reported an error")
        self._end_late(now)

    def _settle(self, cause: str) -> None:
        newest = self.newest()
        after = (
            f"last good checkpoint: {newest}; go on with --resume" if newest else "there is no checkpoint yet"
        )
        self._cause = f"{cause}; {after}"
        self._deadline = time.monotonic() + _LEAVE
        self._settled.set()

    def _end_late(self, now: float) -> None:
        """Ends the process if its training loop does not: it may hang in what is not Python."""
        if not self._settled.is_set() or now < self._deadline or (self._told and not self._terminated):
            return
        if not self._told:
            print(f"lct_fast: {self._cause}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(128 + signal.SIGTERM if self._terminated else 1)
        self._closing = True

    def _sleep(self, seconds: float) -> None:
        """Until the time is over or somebody stirs; a signal does, whatever the training loop is at."""
        self._woken.settimeout(seconds)
        with suppress(TimeoutError):
            self._terminated |= signal.SIGTERM in self._woken.recv(64)

    def _stir(self) -> None:
        # Full: it wakes up anyway. Closed: it has ended.
        with suppress(OSError):
            self._wake.send(b"\0")

    # The store.

    def _send_beat(self) -> None:
        self._alive += 1
        mine = Beat(self._alive, self._turns, self._work, self._phase, self._batch, self._waits)
        self._store.set(f"beat/{self.rank}", json.dumps(mine))

    def _read_beats(self) -> list[Beat]:
        beats = list(self._judge.beats)
        # A rank that has not begun has no key, and to get it would wait.
        ranks = [r for r in range(len(beats)) if beats[r].alive or self._has(f"beat/{r}")]
        keys = [f"beat/{r}" for r in ranks]
        many = self._store.has_extended_api()
        values = self._store.multi_get(keys) if many else [self._store.get(k) for k in keys]
        for rank, value in zip(ranks, values, strict=True):
            beats[rank] = Beat(*json.loads(value))
        return beats

    def _post(self, report: Report) -> None:
        """A number first, so that reports have an order; then the report."""
        self._store.set(f"report/{self._store.add('reports', 1)}", json.dumps(report))
        if report.rank == self.rank:
            self._posted.set()

    def _reports(self) -> list[Report]:
        keys = [f"report/{n + 1}" for n in range(self._store.add("reports", 0))]
        return [Report(*json.loads(self._store.get(k))) for k in keys if self._has(k)]

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    # Words.

    def _name(self, rank: int) -> str:
        replica, k = divmod(rank, self.groups)
        of = f" of replica {replica}" if len(self.places) > self.groups else ""
        return f"rank {rank} (group {k + 1}{of}, {self.places[rank]})"

    def _message(self, cause: Report, reports: Sequence[Report]) -> str:
        after = f", last heard of after batch {cause.batch}" if cause.batch >= 0 else ""
        if cause.accuses is None:
            return f"{self._name(cause.rank)} {cause.why}{after}"
        if any(r.rank == cause.accuses for r in reports):
            between = f"{self._name(cause.rank)} and {self._name(cause.accuses)}"
            return f"the link between {between} broke: the first says that the second {cause.why}{after}"
        return f"{self._name(cause.accuses)} {cause.why}{after}"

    def _with_place(self, standing: Report) -> Report:
        """For this process's own loop: the line it stands at."""
        if standing.accuses is not None:
            return standing
        frame = sys._current_frames().get(self._main)
        place = f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
        return standing._replace(why=f"{standing.why} (it is{place})") if place else standing

    def _holder(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return "the launcher (torchrun)"
        return f"{self._name(0)}, which holds the rendezvous store,"

    # SIGTERM, which a launcher sends to all when one process has ended.

    def _listen_for_sigterm(self) -> None:
        """Only where nobody else handles it: the thread gets to say why before the process ends."""
        main = threading.current_thread() is threading.main_thread()
        self._listens = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._listens:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            # Written to by the C handler, so also while the main thread is in a kernel or a collective.
            self._others_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def _on_sigterm(self, number: int, frame: object) -> None:
        """The thread has been woken already; without one the signal ends the process as if nobody listened."""
        if not self._thread.is_alive():
            self._leave(128 + number)

    def _deafen(self) -> None:
        if self._listens and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._others_fd)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._listens = False
        self._wake.close()
        self._woken.close()


def _leave_to_parent() -> None:
    """In a forked process, a data loader's for example: its SIGTERM is its own, and must not wake the parent."""
    for heart in _active:
        if heart._listens:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            heart._listens = False
        atexit.unregister(heart.close)
    _active.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def store_of(run: str, step_timeout: float) -> Store:
    """torch.distributed's store, under a prefix, over a connection of its own: others' waits do not hold it up."""
    store: Any = PrefixStore(f"lct_fast/{run}", _get_default_store())
    store = store.clone()
    store.set_timeout(timedelta(seconds=min(step_timeout, 300.0)))
    return store


def _short(error: BaseException) -> str:
    """The first sentence of a transport's error, without its source position."""
    return re.sub(r"^\[[^\]]*\.\w+:\d+\]\s*", "", first_line(error)).split(". ")[0]


def _where(error: BaseException) -> str:
    """ " at file:line" of the innermost frame of an error that was raised."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f" at {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last is not None else ""
