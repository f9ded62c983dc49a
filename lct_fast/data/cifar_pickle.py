"""The python form of CIFAR is pickled; read it without running anything that the file asks for."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from .errors import DataError, reason


class _Array:
    """Stands in for numpy.ndarray: takes the state that numpy pickles and checks it, without numpy's own
    code.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.raw = b""
        self.fortran = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "uint8") or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not uint8")
        if not isinstance(shape, tuple) or not all(isinstance(extent, int) for extent in shape):
            raise pickle.UnpicklingError("an array without a shape")
        self.shape = shape
        self.raw = raw
        self.fortran = bool(fortran)


class _Kind:
    """Stands in for numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: a uint8 has neither."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    """How newer Pythons write bytes in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("a string in an unexpected encoding")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data does not need")
        return _ADMITTED[module, name]


def read_pickle(raw: bytes, what: str, label_key: bytes, width: int) -> tuple[Tensor, Tensor]:
    """(rows uint8 [N, width], labels int64 [N]) of a pickled dict with b"data" and ``label_key``.

    Only a dict of arrays, lists, strings and numbers can come out: every global but numpy's array and dtype
    is refused, and those two are stand-ins. Raises DataError for anything else, and for a file that is cut
    short.
    """
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        data, labels = content[b"data"], content[label_key]
        if not isinstance(data, _Array) or not isinstance(labels, list):
            raise pickle.UnpicklingError("no array of images or no list of labels")
        if data.shape != (len(labels), width) or len(data.raw) != len(labels) * width or not labels:
            raise pickle.UnpicklingError(
                f"images {data.shape} of {len(data.raw)} bytes for {len(labels)} labels"
            )
        flat = torch.frombuffer(bytearray(data.raw), dtype=torch.uint8)
        rows = flat.view(width, -1).t().contiguous() if data.fortran else flat.view(-1, width)
        return rows, torch.tensor(labels, dtype=torch.int64)
    # A damaged pickle raises nearly anything: the opcodes it is made of are arbitrary bytes.
    except Exception as error:
        raise DataError(
            f"{what}: expected a pickled dict with {label_key.decode()} and uint8 rows of {width}, got "
            f"{reason(error)}; fetch it again"
        ) from None
