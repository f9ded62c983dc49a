"""Where the tests of one op run."""

from collections.abc import Iterator
from typing import Any

import pytest

from lct_fast import ops
from tests.ladder import PLACES, Place


def place_of(op: str) -> Any:
    """The fixture ``place`` of a module whose op not every backend has: without those that have it not."""

    @pytest.fixture(name="place", params=[p for p in PLACES if p.backend in ops.backends(op)], ids=str)
    def fixture(request: pytest.FixtureRequest) -> Iterator[Place]:
        chosen: Place = request.param
        with ops.use_backend(chosen.backend):
            yield chosen

    return fixture
