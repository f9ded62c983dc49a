"""Fixtures for every test: where an op runs, poisoned memory, thread count."""

import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

# cuBLAS is only deterministic with a workspace of fixed size, and reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402 (torch reads the variable above)
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read by @triton.jit when it decorates, so it has to stand before any kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Helpers are imported as tests.ladder, also when pytest is not started as a module.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.ladder import PLACES, Place  # noqa: E402 (needs the two lines above)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard", help="I/N: run every N-th test, from the I-th: one of N processes", metavar="I/N"
    )
    parser.addoption(
        "--seconds", type=float, help="begin no test after this long; the status is 2 where some are left"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard")
    if shard:
        index, count = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
        items[:] = items[index::count]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seconds"):
        config.pluginmanager.register(Deadline(config.getoption("--seconds")))


class Deadline:
    """Ends a session in time to write its reports, which one that is killed never does."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What runs on a device comes first."""
        items.sort(key=lambda item: "-cuda" not in item.name and item.get_closest_marker("cuda") is None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        result = yield
        if nextitem is not None and time.monotonic() > self.until:
            item.session.shouldstop = "the time is up"
        return result


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skips a test, by name, where there are fewer CUDA devices."""
    found = torch.cuda.device_count()
    return pytest.mark.skipif(found < count, reason=f"needs {count} CUDA devices, {found} here")


def pytest_report_header() -> str:
    places = ", ".join(map(str, PLACES))
    missing = "" if torch.cuda.is_available() else " (no CUDA device: triton is interpreted, cuda is not run)"
    return f"lct_fast: ops run on {places}{missing}"


@pytest.fixture(params=PLACES, ids=str)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A backend on a device, for every pair this machine has; ops called in the test run there."""
    from lct_fast import ops

    chosen: Place = request.param
    with ops.use_backend(chosen.backend):
        yield chosen


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its kin return: NaN in floats, all ones in bytes (a NaN too, read as floats).

    An output or workspace read before it is written then shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread on entry, and whatever the test sets is undone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
