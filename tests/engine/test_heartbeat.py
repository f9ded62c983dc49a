"""Heartbeats: who is said to be lost, what is said of it, and that nobody waits for ever."""

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lct_fast.engine import PeerError
from lct_fast.engine.transport import heartbeat
from lct_fast.engine.transport.heartbeat import Heartbeat
from lct_fast.engine.transport.watch import Beat, Phase, Report, Watch, root_cause

RUNNING, STARTING, ENDING = Phase.RUNNING, Phase.STARTING, Phase.ENDING


def _watch(size: int = 3, rank: int = 0) -> Watch:
    return Watch(rank, size, start_timeout=100.0, step_timeout=10.0, now=50.0, pause=2.0)


def _run(watch: Watch, seconds: int, beats: Callable[[int], list[Beat]]) -> tuple[int, Report] | None:
    """Looks once a second from second 1; when something was found, and what."""
    for t in range(1, seconds + 1):
        found = watch.look(beats(t), 50.0 + t)
        if found is not None:
            return t, found
    return None


def _living(t: int, phase: str = RUNNING, waits: str = "") -> Beat:
    return Beat(t, t, t, phase, t, waits)


def test_ranks_that_turn_are_left_alone_also_while_they_wait() -> None:
    def beats(t: int) -> list[Beat]:
        waiting = Beat(t, t, 1, RUNNING, 1, "a packet")
        return [_living(t), waiting, waiting]

    assert _run(_watch(), 200, beats) is None


def test_a_rank_that_says_nothing_is_found_by_all_others_after_step_timeout() -> None:
    def beats(t: int) -> list[Beat]:
        return [_living(t), _living(t), _living(min(t, 20))]

    for rank in (0, 1):
        found = _run(_watch(rank=rank), 100, beats)
        assert found == (31, Report(rank, 20, "stopped answering 11 s ago", 2))


def test_a_loop_that_hangs_is_told_from_a_process_that_is_gone() -> None:
    def beats(t: int) -> list[Beat]:
        return [_living(t), _living(t), Beat(t, min(t, 5), min(t, 5), RUNNING, 4)]

    found = _run(_watch(), 100, beats)
    assert found is not None and found[0] == 16
    assert (
        found[1].accuses == 2
        and "has stood still in its training loop for 11 s: raise step_timeout" in found[1].why
    )
    own = _run(_watch(rank=2), 100, beats)
    assert own is not None and own[1].accuses is None and own[1].rank == 2


def test_the_start_has_a_timeout_of_its_own_that_waiting_does_not_use_up() -> None:
    def compiles(t: int) -> list[Beat]:
        # Rank 1 waits for rank 0's first batch, then takes as long itself.
        first = Beat(t, 1, 1, STARTING) if t < 90 else _living(t)
        second = Beat(t, t, 0, STARTING, -1, "a packet") if t < 90 else Beat(t, 90, 1, STARTING)
        return [first, second if t < 180 else _living(t)]

    assert _run(_watch(2), 250, compiles) is None
    found = _run(_watch(2), 250, lambda t: [_living(t), Beat(1, 0, 0, STARTING)])
    assert found is not None and found[0] == 101 and found[1].accuses == 1


def test_a_rank_never_heard_of_is_lost_after_start_timeout() -> None:
    found = _run(_watch(2), 250, lambda t: [_living(t), Beat()])
    assert found == (101, Report(0, -1, "stopped answering 101 s ago", 1))


def test_behind_the_end_a_loop_may_rest_but_not_its_process() -> None:
    assert _run(_watch(2), 300, lambda t: [_living(t), Beat(t, 3, 3, ENDING, 2)]) is None
    found = _run(_watch(2), 300, lambda t: [_living(t), Beat(min(t, 7), 3, 3, ENDING, 2)])
    assert found == (18, Report(0, 2, "stopped answering 11 s ago", 1))


def test_all_waiting_for_each_other_is_an_error_that_says_for_what() -> None:
    def beats(t: int) -> list[Beat]:
        return [Beat(t, t, 4, RUNNING, 4, "room"), Beat(t, t, 4, RUNNING, 3, "a packet")]

    found = _run(_watch(2), 100, beats)
    assert found is not None and found[0] == 12
    assert "nothing has moved for 11 s (waiting: rank 0 for room, rank 1 for a packet)" in found[1].why
    # One that works is under its own timeout, not under this one.
    assert _run(_watch(2), 100, lambda t: [beats(t)[0], _living(t)]) is None


def test_time_in_which_the_watcher_itself_was_stopped_does_not_count() -> None:
    watch = _watch(2)
    assert watch.look([_living(1), _living(1)], 51.0) is None
    # Stopped for an hour, and the other rank's newest beat has not come yet.
    assert watch.look([_living(2), _living(1)], 3651.0) is None
    assert watch.look([_living(3), _living(2)], 3652.0) is None


def test_the_longest_silence_is_the_one_named() -> None:
    found = _run(_watch(), 100, lambda t: [_living(t), _living(min(t, 9)), _living(min(t, 8))])
    assert found is not None and found[1].accuses == 2


def test_root_causes() -> None:
    lost = Report(0, 7, "is gone", 1)
    assert root_cause([], False) is None
    # Rank 1 may still say why.
    assert root_cause([lost], True) is None
    assert root_cause([lost], False) == lost
    # Its own words win over those of who lost it, whatever the order.
    own = Report(1, 8, "ended by NonFiniteError")
    assert root_cause([lost, own], True) == own
    # Rank 2 died: rank 1 lost it, and rank 0 lost rank 1.
    died = Report(1, 8, "is gone", 2)
    assert root_cause([lost, died], False) == died
    assert root_cause([lost, died], True) is None
    # Two that lost each other live: the link is at fault.
    back = Report(1, 7, "is gone", 0)
    assert root_cause([lost, back], True) == lost


class _Two:
    """Two ranks' heartbeats in this process; what each one's process would have ended with."""

    def __init__(self, **timeouts: float) -> None:
        self.store = dist.HashStore()
        self.exits: list[list[int]] = [[], []]
        self.hearts = [
            Heartbeat(
                self.store,
                rank,
                2,
                ["north, cpu, process 11", "south, cpu, process 22"],
                **{"start_timeout": 60.0, "step_timeout": 60.0} | timeouts,  # type: ignore[arg-type]
                leave=self.exits[rank].append,
            )
            for rank in range(2)
        ]

    def wait_for(self, rank: int) -> str:
        """Rank's training loop waits until it is told the end."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self.hearts[rank].wait("a packet")
            except PeerError as error:
                return str(error)
            time.sleep(0.02)
        raise TimeoutError(f"rank {rank} was told nothing")


@pytest.fixture
def two() -> Iterator[Callable[..., _Two]]:
    made: list[_Two] = []

    def make(**timeouts: float) -> _Two:
        made.append(_Two(**timeouts))
        return made[-1]

    yield make
    for pair in made:
        for heart in reversed(pair.hearts):
            heart.close()


def test_the_reason_of_a_rank_reaches_the_other_with_its_place_and_the_checkpoint(two: Any) -> None:
    pair = two()
    pair.hearts[0].newest = lambda: Path("runs/x/checkpoints/step-00000100")
    pair.hearts[1].done(118)
    pair.hearts[1].report(ValueError("the loss of group 2 is NaN\nmore"))
    assert pair.wait_for(0) == (
        "rank 1 (group 2, south, cpu, process 22) ended by ValueError: the loss of group 2 is NaN, last heard of after "
        "batch 118; last good checkpoint: runs/x/checkpoints/step-00000100; go on with --resume"
    )
    # Who reported tells its own error, and nobody else ends its process.
    pair.hearts[1].beat()
    assert pair.exits == [[], []]


def test_a_lost_link_is_named_once_the_other_had_time_to_speak(two: Any) -> None:
    pair = two()
    pair.hearts[0].lost(1, RuntimeError("[/a/b.cc:54] Connection closed by peer [1.2.3.4]:5. Some advice."))
    error = pair.hearts[0].verdict("otherwise")
    assert str(error).startswith(
        "rank 1 (group 2, south, cpu, process 22) is gone (Connection closed by peer [1.2.3.4]:5)"
    )
    assert "there is no checkpoint yet" in str(error)
    assert "is gone" in pair.wait_for(1)


def test_a_link_cut_between_two_that_live_is_told_as_that(two: Any) -> None:
    pair = two()
    for rank in (0, 1):
        pair.hearts[rank].lost(1 - rank, RuntimeError("Broken pipe"))
    for rank in (0, 1):
        assert re.match(
            r"the link between rank \d \(group \d, .*\) and rank \d \(.*\) broke: the first says that the second is",
            pair.wait_for(rank),
        )


@pytest.mark.slow
def test_a_loop_that_hangs_ends_its_process_and_is_named_with_its_line(
    two: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = two(step_timeout=2.0)
    pair.hearts[0].done(3)
    stop = threading.Event()

    def other() -> None:
        pair.hearts[1].done(3)
        while not stop.is_set():
            try:
                pair.hearts[1].wait("a packet")
            except PeerError as error:
                told.append(str(error))
                return
            time.sleep(0.01)

    told: list[str] = []
    thread = threading.Thread(target=other)
    thread.start()
    # This thread is rank 0's training loop, and does nothing.
    deadline = time.monotonic() + 60
    while not pair.exits[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert pair.exits[0] == [1] and not pair.exits[1]
    said = capfd.readouterr().err
    assert "lct_fast: rank 0 (group 1, north, cpu, process 11) has stood still in its training loop" in said
    assert "it is at test_heartbeat.py:" in said and "raise step_timeout" in said
    assert told and told[0].startswith("rank 0 (group 1")


def test_a_rank_that_ended_its_stream_may_rest(two: Any) -> None:
    pair = two(step_timeout=0.5)
    for heart in pair.hearts:
        heart.done(1)
        heart.end()
    time.sleep(1.5)
    assert pair.exits == [[], []] and pair.store.add("reports", 0) == 0


def test_what_is_done_together_behind_the_end_names_who_is_lost(two: Any) -> None:
    pair = two()
    for heart in pair.hearts:
        heart.done(1)
        heart.end()
    with (
        pytest.raises(PeerError, match=r"rank 1 .*ended by MemoryError: too large"),
        pair.hearts[0].together(),
    ):
        pair.hearts[1]._phase = RUNNING
        pair.hearts[1].report(MemoryError("too large"))
        raise RuntimeError("Connection closed by peer")


class _Gone:
    """A store whose server has ended: whatever is asked of it, the connection is broken."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Broken pipe")


def test_the_end_of_the_launcher_ends_a_rank(monkeypatch: pytest.MonkeyPatch, two: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    pair = two()
    pair.hearts[0]._store = _Gone()
    assert pair.wait_for(0).startswith(
        "the launcher (torchrun) is gone: the rendezvous store was lost (Broken pipe)"
    )
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    pair.hearts[1]._store = _Gone()
    assert pair.wait_for(1).startswith(
        "rank 0 (group 1, north, cpu, process 11), which holds the rendezvous store,"
    )


class _Stopped:
    """A store whose server answers nothing, until the test is over."""

    def __init__(self, over: threading.Event) -> None:
        self.over = over

    def __getattr__(self, name: str) -> Any:
        assert self.over.wait(60)
        raise RuntimeError("wait timeout")


def test_a_launcher_that_answers_nothing_ends_a_rank(monkeypatch: pytest.MonkeyPatch, two: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    pair, over = two(step_timeout=1.0), threading.Event()
    for heart in pair.hearts:
        heart._store = _Stopped(over)
    try:
        for rank in (0, 1):
            assert pair.wait_for(rank).startswith("the launcher (torchrun) has not answered for 1 s")
    finally:
        over.set()


def test_sigterm_lets_the_cause_be_told_first(two: Any) -> None:
    pair = two()
    os.kill(os.getpid(), signal.SIGTERM)
    pair.hearts[1].report(ValueError("out of everything"))
    # Both are in this process; the first one listens.
    assert "rank 1 (group 2, south, cpu, process 22) ended by ValueError: out of everything" in pair.wait_for(
        0
    )
    deadline = time.monotonic() + 60
    while not pair.exits[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pair.exits[0] == [128 + signal.SIGTERM]


def test_sigterm_without_a_cause_ends_the_process_too(two: Any) -> None:
    pair = two()
    os.kill(os.getpid(), signal.SIGTERM)
    assert "rank 0 (group 1, north, cpu, process 11) was ended by SIGTERM" in pair.wait_for(0)


def test_sigterm_is_left_to_who_handles_it_and_given_back() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        pair = _Two()
        assert signal.getsignal(signal.SIGTERM) is mine
        for heart in reversed(pair.hearts):
            heart.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    pair = _Two()
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    for heart in reversed(pair.hearts):
        heart.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    assert not any(t.name == "heartbeat" for t in threading.enumerate())


def test_sigterm_to_a_forked_process_is_its_own(two: Any) -> None:
    pair = two()
    ready, begun = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on: a process with threads forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(begun, b"1")
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"1"
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    time.sleep(0.5)
    assert not pair.hearts[0]._terminated and not pair.hearts[0]._settled.is_set()


def test_sigterm_ends_a_process_that_has_nobody_to_listen(two: Any) -> None:
    pair = two()
    # Behind the end of the stream a lost store is nobody's business.
    pair.hearts[0].end()
    pair.hearts[0]._store = _Gone()
    pair.hearts[0]._thread.join(60)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert pair.exits[0] == [128 + signal.SIGTERM]


def test_the_command_line_reports_through_every_heart(two: Any) -> None:
    pair = two()
    heartbeat._active.remove(pair.hearts[0])
    heartbeat.report(OSError(28, "No space left on device"))
    heartbeat._active.append(pair.hearts[0])
    assert "rank 1 (group 2, south, cpu, process 22) ended by OSError: [Errno 28] No space" in pair.wait_for(
        0
    )
