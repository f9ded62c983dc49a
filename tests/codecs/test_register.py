"""Codecs of one's own as specs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast import codecs
from tests.engine import nets


class Scaled(codecs.Codec):
    """fp16 of a multiple."""

    def __init__(self, factor: str) -> None:
        if not factor.isdecimal():
            raise ValueError(f"scaled:N: expected a whole number, got {factor!r}")
        self.name, self.factor = f"scaled:{factor}", int(factor)

    def encode(self, h: Tensor, *, learn: bool = True) -> codecs.Encoded:
        return codecs.Encoded((codecs.dense(h * self.factor).half(),), codecs.Layout.of(h))

    def decode(self, encoded: codecs.Encoded) -> Tensor:
        return encoded.only(self.name, torch.float16).to(encoded.layout.dtype) / self.factor


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(codecs, "_OWN", {})
    codecs.register("scaled", Scaled)
    yield


def test_a_registered_codec_is_a_spec_like_any_other() -> None:
    codec = codecs.build("scaled:4")
    assert isinstance(codec, Scaled) and codec.factor == 4 and "scaled" in codecs.names()
    x = torch.randn(2, 8, 6, 4)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, atol=1e-2, rtol=1e-2)
    assert codecs.build("downsample:2+scaled:4").encode(x).nbytes == x.nbytes // 8
    with pytest.raises(ValueError, match="scaled:N: expected a whole number, got 'x'"):
        codecs.build("scaled:x")


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_groups_train_through_it(schedule: str) -> None:
    sent = {}
    for codec in ("none", "scaled:2"):
        trainer = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), codec=codec, schedule=schedule)
        for x, y in nets.batches(4):
            trainer.step(x, y)
        trainer.settle()
        sent[codec] = sum(w.meter.wire_bytes for w in trainer.workers)
    assert 0 < sent["scaled:2"] == sent["none"] // 2


def test_names_that_cannot_be_registered_are_refused() -> None:
    for name in ("vq", "none", "auto", "downsample", "a:b", "a+b", ""):
        with pytest.raises(ValueError, match="codec name: expected an identifier other than auto, bf16"):
            codecs.register(name, Scaled)


def test_a_codec_of_another_name_is_refused() -> None:
    codecs.register("other", lambda arguments: Scaled("3"))
    with pytest.raises(
        ValueError, match="codec 'other': expected a codec of that name, got one named 'scaled:3'"
    ):
        codecs.build("other")
