"""The python form of CIFAR is pickled; read it without running anything that the file asks for."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import torch
from torch import Tensor

from .errors import DataError, reason


class _Array:
    """Stands in for numpy.ndarray: takes and checks the state that numpy pickles, without numpy's code."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.raw = b""
        self.fortran = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "uint8") or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not uint8")
        if not isinstance(shape, tuple) or list(map(type, shape)) != [int, int]:
            raise pickle.UnpicklingError("an array that is not two-dimensional")
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


# What numpy, lists, strings and numbers need in protocols 0 to 3.
# fmt: off
_OPCODES = frozenset((
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "UNICODE", "BINUNICODE", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE",
    "BUILD", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
))
# fmt: on


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data does not need")
        return _ADMITTED[module, name]


def _check_opcodes(raw: bytes) -> None:
    """Raise unless the pickle is whole and plain.

    A few damaged bytes can make the unpickler allocate gigabytes before it notices: it trusts the length of a
    bytearray, and makes room for as many memo slots as the highest index says.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}, which image data does not need")
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > len(raw):
            raise pickle.UnpicklingError(f"memo slot {argument} in {len(raw)} bytes")


def read_pickle(raw: bytes, what: str, label_key: bytes, width: int) -> tuple[Tensor, Tensor]:
    """(rows uint8 [N, width], labels int64 [N]) of a pickled dict with b"data" and ``label_key``.

    Only a dict of arrays, lists, strings and numbers can come out: every global but numpy's array and dtype
    is refused, and those two are stand-ins. Raises DataError for anything else, and for a file that is cut
    short.
    """
    try:
        _check_opcodes(raw)
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        data, labels = content[b"data"], content[label_key]
        if not isinstance(data, _Array) or not isinstance(labels, list) or {int} != set(map(type, labels)):
            raise pickle.UnpicklingError("no array of images or no list of labels")
        if data.shape != (len(labels), width) or len(data.raw) != len(labels) * width:
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
