"""What a tensor looks like on the wire between two groups."""

from __future__ import annotations

from collections.abc import Callable

from lct_fast.codecs.block_quantization import KINDS, BlockQuantization
from lct_fast.codecs.cast import Cast
from lct_fast.codecs.codec import Codec, CodecError, Encoded, Layout, dense
from lct_fast.codecs.downsample import Downsample
from lct_fast.codecs.identity import Identity
from lct_fast.codecs.top_k import TopK
from lct_fast.codecs.vector_quantization import VectorQuantization

_FORMS = (
    "none",
    "bf16",
    *(f"{kind}[:BLOCK]" for kind in KINDS),
    "vq:K,D[,S]",
    "topk:N",
    "downsample:F[+CODEC]",
)
# Registered ones, by name.
_OWN: dict[str, Callable[[str], Codec]] = {}


def names() -> list[str]:
    """The forms of spec that ``build`` knows."""
    return [*_FORMS, *_OWN]


def register(name: str, make: Callable[[str], Codec]) -> None:
    """Lets ``build`` make a codec of your own, and so ``Trainer(codec=...)``, in this process.

    Args:
        name: what specs of it begin with, NAME or NAME:ARGUMENTS.
        make: gets the ARGUMENTS, "" if there are none, and returns a new codec, one end of one cut, whose ``name`` is
            the whole spec. It raises ValueError where they do not fit.

    Raises:
        ValueError: the name is not an identifier, or taken.
    """
    taken = {form.partition(":")[0].partition("[")[0] for form in _FORMS} | {"auto"}
    if not name.isidentifier() or name in taken:
        raise ValueError(
            f"codec name: expected an identifier other than {', '.join(sorted(taken))}, got {name!r}"
        )
    _OWN[name] = make


def build(spec: str) -> Codec:
    """A new codec, one end of one cut.

    Args:
        spec: "none", "bf16"; "fp8", "int8", "int4" or "int2", with ":BLOCK" for blocks of other than 64 values; or
            "vq:K,D", K words for vectors of D channels, "vq:K,D,S" for patches of S x S; "topk:N", one value in N; or
            "downsample:F", feature maps F times smaller each way, with "+" and another spec for how these are coded; or
            one that was given to ``register``.

    Raises:
        ValueError: unknown name, or numbers that do not fit.
    """
    if spec.startswith("downsample"):
        return _downsample(spec)
    name, _, rest = spec.partition(":")
    if name in _OWN:
        return _named(_OWN[name](rest), spec)
    numbers = [part.strip() for part in rest.split(",")] if rest else []
    if not all(n.isdecimal() for n in numbers):
        raise ValueError(
            f"codec {spec!r}: expected whole numbers after the colon, as in vq:256,8 or int4:128"
        )
    values = [int(n) for n in numbers]
    if name in ("none", "bf16") and not values:
        return Identity() if name == "none" else Cast()
    if name in KINDS and len(values) <= 1:
        return BlockQuantization(name, *values)
    if name == "vq" and len(values) in (2, 3):
        return VectorQuantization(*values)
    if name == "topk" and len(values) == 1:
        return TopK(*values)
    raise ValueError(f"unknown codec {spec!r}: choose one of {', '.join(names())}")


def _named(codec: Codec, spec: str) -> Codec:
    """Both ends of a cut, and a resumed run, know a codec by its name."""
    if codec.name != spec:
        raise ValueError(f"codec {spec!r}: expected a codec of that name, got one named {codec.name!r}")
    return codec


def _downsample(spec: str) -> Codec:
    own, _, inner = spec.partition("+")
    factor = own.removeprefix("downsample:")
    if not factor.isdecimal() or inner.startswith("downsample"):
        raise ValueError(
            f"codec {spec!r}: expected downsample:F or downsample:F+CODEC, as in downsample:2+int4"
        )
    return Downsample(int(factor), build(inner or "none"))


__all__ = [
    "BlockQuantization",
    "Cast",
    "Codec",
    "CodecError",
    "Downsample",
    "Encoded",
    "Identity",
    "Layout",
    "TopK",
    "VectorQuantization",
    "build",
    "dense",
    "names",
    "register",
]
