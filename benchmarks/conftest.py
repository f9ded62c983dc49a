"""Options of the pytest-benchmark suites."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny", action="store_true", help="tiny shapes: a trial of the code, its times mean nothing"
    )
