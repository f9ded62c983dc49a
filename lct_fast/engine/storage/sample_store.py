"""What a group keeps for every training sample: tensors by name, coded or not, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lct_fast import codecs
from lct_fast.codecs import CodecError, Encoded
from lct_fast.methods import Method, SampleState


@dataclass(frozen=True, slots=True)
class Samples:
    """Which samples a batch holds, checked; what a group finds its state by.

    Args:
        method: of the run. count: samples of the training set; None where nobody said.
    """

    method: Method
    count: int | None

    def check(self, samples: Tensor | None, x: Tensor) -> Tensor | None:
        """The samples of the batch ``x``; None where the method keeps nothing for them.

        With auxiliary nets a copy of ``x`` itself, which the caller may write over while groups still need it.

        Raises:
            ValueError: they are missing, or not different numbers in the training set, one a row of ``x``.
        """
        rows = len(x)
        if not self.method.sample_state:
            return None
        if self.method.auxiliary:
            return x.clone()
        if self.count is None:
            raise ValueError(
                f"{self.method.name} keeps a state for each training sample: say how many there are with "
                f"Trainer(..., samples=N)"
            )
        if samples is None:
            raise ValueError(
                f"{self.method.name} keeps a state for each training sample: say which ones the batch holds with "
                f"step(x, y, samples), int64 [{rows}]"
            )
        if samples.dtype != torch.int64 or samples.shape != (rows,):
            got = f"{str(samples.dtype).removeprefix('torch.')} {list(samples.shape)}"
            raise ValueError(f"samples: expected int64 [{rows}], got {got}")
        samples = samples.cpu()
        low, high = int(samples.min()), int(samples.max())
        if low < 0 or high >= self.count:
            raise ValueError(f"samples: expected numbers 0..{self.count - 1}, got {low}..{high}")
        if len(samples.unique()) != rows:
            raise ValueError(
                "samples: expected each sample once in a batch, got one twice; shuffle without replacement"
            )
        return samples


class SampleStore:
    """Tensors of one group for every training sample. A sample is unknown until it is first written.

    Args:
        names: of the tensors. count: samples. shape: of each tensor, for one sample.
        codec: spec of what the tensors are kept as; decoded they are fp32.
        device: where they are kept, and given out.
        file: path, without an ending, of files to keep them in; None for memory. Files are written over.

    Attributes:
        era: how often all was forgotten.

    Raises:
        ValueError: a codec with a state, or one that codes samples of this shape not each by itself; no room on disk.
    """

    what = "state of samples"

    def __init__(
        self,
        names: Sequence[str],
        count: int,
        shape: tuple[int, ...],
        codec: str,
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"samples: expected a number >= 1 of training samples, got {count}")
        if file is not None and device.type != "cpu":
            raise ValueError(f"sample_folder: files are for groups on the CPU, this one is on {device}")
        self.names, self.count, self.shape, self.device = tuple(names), count, tuple(shape), device
        self.codec = codecs.build(codec)
        self.codec.check(self.shape)
        self.era = 0
        self.known = torch.zeros(count, dtype=torch.bool, device=device)
        self._forms: dict[int, Encoded] = {}
        rows = self._of_one_sample()
        self._parts = {
            name: [
                self._room(part, None if file is None else file.with_name(f"{file.name}-{name}-{i}.bin"))
                for i, part in enumerate(rows)
            ]
            for name in self.names
        }

    def read(self, samples: Tensor) -> SampleState:
        """What is kept for these samples [N], on the store's device."""
        index = samples.to(self.device)
        known = self.known[index]
        tensors = {}
        for name, parts in self._parts.items():
            form = self._form(len(samples))
            coded = tuple(p[index].view(t.shape) for p, t in zip(parts, form.tensors, strict=True))
            value = self.codec.decode(Encoded(coded, form.layout))
            tensors[name] = value.masked_fill(~known.view(-1, *[1] * len(self.shape)), 0.0)
        return SampleState(known, tensors)

    def write(self, samples: Tensor, tensors: dict[str, Tensor]) -> None:
        """Keeps these tensors [N, ...], fp32, for samples [N]. Rows with NaN or Inf leave their sample unknown."""
        index = samples.to(self.device)
        sound = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in tensors.values()]).all(0)
        for name, parts in self._parts.items():
            for part, coded in zip(parts, self.codec.encode(tensors[name]).tensors, strict=True):
                part[index] = coded.reshape(len(index), *part.shape[1:])
        self.known[index] = sound

    def forget(self) -> None:
        """No sample is known any more; what was read before is not to be written back."""
        self.known.zero_()
        self.era += 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(p.nbytes for parts in self._parts.values() for p in parts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the tensors themselves, which it copies and never writes to."""
        return {"era": self.era, "known": self.known, "tensors": self._parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Copies what ``state`` gave.

        Raises:
            ValueError: it is of another number of samples, shape or codec.
        """
        found = {n: [(p.shape, p.dtype) for p in parts] for n, parts in state["tensors"].items()}
        wanted = {n: [(p.shape, p.dtype) for p in parts] for n, parts in self._parts.items()}
        if found != wanted:
            raise ValueError(f"state of samples: expected {wanted}, got {found}")
        self.era = state["era"]
        self.known.copy_(state["known"])
        for name, parts in self._parts.items():
            for part, saved in zip(parts, state["tensors"][name], strict=True):
                part.copy_(saved)

    def _form(self, rows: int) -> Encoded:
        """What the codec makes of so many samples: shapes and layout."""
        if rows not in self._forms:
            self._forms[rows] = self.codec.encode(
                torch.zeros(rows, *self.shape, device=self.device), learn=False
            )
        return self._forms[rows]

    def _of_one_sample(self) -> list[Tensor]:
        """The coded tensors of one sample, once it is clear that samples are coded apart."""
        draw = torch.Generator().manual_seed(0)
        two = torch.randn(2, *self.shape, generator=draw).to(self.device)
        try:
            both, first, second = (self.codec.encode(t, learn=False) for t in (two, two[:1], two[1:]))
        except CodecError:
            raise ValueError(
                f"sample_codec {self.codec.name!r} learns as it codes: use one without a state, such as int8 or bf16"
            ) from None
        for whole, *halves in zip(both.tensors, first.tensors, second.tensors, strict=True):
            if not torch.equal(whole.flatten(), torch.cat([half.flatten() for half in halves])):
                raise ValueError(
                    f"sample_codec {self.codec.name!r} does not code samples of shape {self.shape} each by itself: use "
                    f"a block that divides {two[0].numel()} values, or none"
                )
        return [t.flatten() if t.dim() == 1 else t[0] for t in first.tensors]

    def _room(self, like: Tensor, file: Path | None) -> Tensor:
        """[count, ...] of zeros."""
        shape = (self.count, *like.shape)
        if file is None:
            return torch.zeros(shape, dtype=like.dtype, device=self.device)
        size = self.count * like.numel()
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("wb") as made:
                # A write to a mapped file that finds no room ends the process: take all of it now.
                os.posix_fallocate(made.fileno(), 0, size * like.element_size())
        except OSError as error:
            raise ValueError(
                f"no room for {size * like.element_size()} bytes of the samples' state at {file} ({error.strerror}): "
                f"make room, or use a sample_codec"
            ) from None
        return torch.from_file(str(file), shared=True, size=size, dtype=like.dtype).view(shape)
