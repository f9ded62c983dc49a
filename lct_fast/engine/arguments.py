"""What ``Trainer`` is given, refused where it cannot be meant: before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lct_fast import codecs
from lct_fast.engine.network.group import Group, units_of
from lct_fast.methods import Method


def check_groups(groups: Sequence[Group]) -> None:
    """Refuses anything but all groups of one ``lct.split``, in order.

    Raises:
        ValueError: in one line.
    """
    if isinstance(groups, Group) or not isinstance(groups, Sequence) or not groups:
        got = "none" if not groups else f"a {type(groups).__name__}"
        raise ValueError(f"groups: expected at least one group of lct.split, got {got}")
    odd = next((g for g in groups if not isinstance(g, Group)), None)
    if odd is not None:
        raise ValueError(f"groups: expected those of lct.split, got a {type(odd).__name__} among them")
    cut = groups[0].cut
    whole = [units_of(nodes) for nodes in cut.groups()]
    if any(g.cut is not cut for g in groups) or [g.units for g in groups] != whole:
        raise ValueError(
            f"groups: expected all {len(whole)} of one lct.split, in order (starting at "
            f"{', '.join(u[0] for u in whole if u)}), got {len(groups)} (starting at "
            f"{', '.join(g.units[0] for g in groups if g.units)})"
        )


def check_method(method: Method) -> None:
    """Refuses anything but an object of a method.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(method, Method):
        raise ValueError(f"method: expected one such as lct.LocalCritic(), got {method!r}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuses what is no integer, or less than ``least``.

    Raises:
        ValueError: in one line.
    """
    if type(value) is bool or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuses what is no number above 0.

    Raises:
        ValueError: in one line.
    """
    if type(value) is bool or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_seconds(name: str, value: float) -> None:
    """Refuses what is no time to wait for.

    Raises:
        ValueError: in one line.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number of seconds, got {value}")


def specs_of_cuts(codec: str | Sequence[str], before: Sequence[Group]) -> list[str]:
    """The codec's spec for each cut, given the groups before the cuts.

    Raises:
        ValueError: a spec that is unknown or does not fit what crosses, or another number of them.
    """
    specs = [codec] if isinstance(codec, str) else list(codec)
    for spec in specs:
        # Refused also where nothing is cut.
        if spec != "auto":
            codecs.build(spec)
    if len(specs) == 1:
        specs *= len(before)
    if len(specs) != len(before):
        raise ValueError(f"codec: expected one spec or one for each of {len(before)} cuts, got {len(specs)}")
    for group, spec in zip(before, specs, strict=True):
        if spec != "auto":
            codecs.build(spec).check(group.shape)
    return specs
