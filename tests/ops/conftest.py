"""Every op test runs with poisoned memory, and on one thread unless it says otherwise."""

import pytest


@pytest.fixture(autouse=True)
def _always(poisoned: None, threads: None) -> None:
    pass
