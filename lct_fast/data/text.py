"""``text:FILE``: a text as a sequence of characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

# One character in ten is for validation: the end of the text.
_TEST_SHARE = 10
_BYTE = 256


@dataclass(frozen=True)
class TextData:
    """A text as ids of its characters, the first nine tenths for training and the rest for validation.

    name: the file's. train, test: [characters], uint8 for up to 256 distinct ones, else int32; each is a place in
    ``vocabulary``. vocabulary: the distinct characters of the whole file, sorted, so validation holds none that has no
    id; one that training lacks is no problem, it is merely never learned. sources: the file.
    """

    name: str
    train: Tensor
    test: Tensor
    vocabulary: list[str]
    sources: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """What is predicted: the vocabulary."""
        return self.vocabulary


def load_text(path: Path, limit: int | None = None, vocabulary: Sequence[str] | None = None) -> TextData:
    """The UTF-8 text in the file ``path``; a byte order mark at its begin is left out, line ends are kept.

    limit: this many characters of the training part, from its begin; validation stays whole. vocabulary: that of an
    earlier run, to be used in place of the file's own.

    Raises DataError, one line, for a file that is missing, not UTF-8 or too short, or with characters that a given
    vocabulary lacks.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"text: expected a file, got {path}, which does not exist; check the path") from None
    except OSError as error:
        raise DataError(
            f"text: cannot read {path}: {error.strerror or error}; expected a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"text: expected UTF-8, got byte {error.object[error.start]:#04x} at {error.start} of {path}; convert the "
            f"file first"
        ) from None
    if limit is not None and limit < 1:
        raise DataError(
            f"limit: expected 1 or more training characters, got {limit}; leave it out to take them all"
        )
    if len(text) < 2 * _TEST_SHARE:
        raise DataError(
            f"text: expected {2 * _TEST_SHARE} characters or more, got {len(text)} in {path}; use a longer text"
        )
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.unique(points) if vocabulary is None else np.array([ord(c) for c in vocabulary], np.uint32)
    _check_known(path, points, known)
    ids = torch.from_numpy(np.searchsorted(known, points)).to(
        torch.uint8 if len(known) <= _BYTE else torch.int32
    )
    cut = len(ids) - len(ids) // _TEST_SHARE
    train, test = ids[:cut].clone(), ids[cut:].clone()
    if limit is not None:
        train = train[:limit].clone()
    return TextData(path.name, train, test, [chr(p) for p in known.tolist()], (str(path),))


def _check_known(path: Path, points: np.ndarray, known: np.ndarray) -> None:
    strange = np.setdiff1d(points, known)
    if len(strange):
        shown = ", ".join(repr(chr(p)) for p in strange[:5].tolist())
        raise DataError(
            f"text: {path} holds {len(strange)} characters that the run's vocabulary lacks ({shown}); use the text "
            f"that the run was trained on"
        )
