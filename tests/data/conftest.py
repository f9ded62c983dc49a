"""A cache folder of its own for every test, and tiny CIFAR sets."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.generated import labelled

Split = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LCT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def ten() -> dict[str, Split]:
    """30 training and 10 test images of ten classes, sorted by class."""
    return {"train": labelled(10, 3, seed=1), "test": labelled(10, 1, seed=2)}


@pytest.fixture(scope="session")
def hundred() -> dict[str, Split]:
    """A hundred images a split, one of each class."""
    return {"train": labelled(100, 1, seed=3), "test": labelled(100, 1, seed=4)}
