"""Vectors of channels as indices into a codebook that follows the activations (arXiv 2106.06401)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.codecs.codec import Codec, CodecError, Encoded, Layout
from lct_fast.codecs.late import Late

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DECAY = 0.99
# A word chosen less than this part of the average is unused.
_UNUSED = 0.05
_CANDIDATES = 16
_FIRST_ROUNDS = 5
# The consumer gets a new codebook when it would take away this part of the quantisation error,
_DRIFT = 0.05
# and codebooks stay below this part of all bytes.
_SHARE = 0.1
_COUNTERS = ("batches", "code_bytes", "codebook_bytes")


class VectorQuantization(Codec):
    """Online vector quantisation of what crosses a cut (arXiv 2106.06401; its codebook's update, decay 0.99).

    The C channels at each position are C / D vectors of D; each of the C / D groups has K words of its own. A vector
    travels as ceil(log2 K) bits: 32 D / log2 K times fewer than fp32. Channels are dimension 1 of [N, C, H, W] and
    the last of anything else.

    The codebook starts as k-means of the first batch and then follows by moving averages; unused words are given
    vectors of the batch. Batches are coded with the codebook the consumer has. It gets a new one, rounded to bf16,
    when the drift between the two, sum_k n_k |c_k - sent_k|^2, exceeds 5 % of the quantisation error, unless codebooks
    would become more than a tenth of all bytes. The drift is read two batches late, so that no device is waited for.

    Args:
        codewords: K, 2 to 65536.
        depth: D; it has to divide C.
    """

    def __init__(self, codewords: int = 256, depth: int = 8) -> None:
        if not 2 <= codewords <= ops.vq.MAX_CODEWORDS or depth < 1:
            raise ValueError(
                f"codec vq:K,D: expected K in 2..{ops.vq.MAX_CODEWORDS} and D >= 1, got vq:{codewords},{depth}"
            )
        self.codewords, self.depth = codewords, depth
        self.name = f"vq:{codewords},{depth}"
        self.version = 0
        # The producer's: the codebook that moves, and the one that the consumer has.
        self.codebook: Tensor | None = None
        self.averages: ops.VQState | None = None
        self.sent: Tensor | None = None
        self.drifts: deque[Late] = deque()
        self.code_bytes = self.codebook_bytes = 0
        self.batches = 0
        # Whether the consumer lacks the codebook that is in use; never between two calls of encode.
        self._unsent = False
        # The consumer's.
        self.known: Tensor | None = None
        self.known_version = 0

    def check(self, shape: tuple[int, ...]) -> None:
        channels = shape[0] if len(shape) == 3 else shape[-1]
        if channels % self.depth:
            raise ValueError(
                f"codec {self.name}: D has to divide the channels, got {channels} of {tuple(shape)}; choose D among "
                f"{', '.join(str(d) for d in range(2, 17) if channels % d == 0) or channels}"
            )

    def encode(self, h: Tensor) -> Encoded:
        x = _rows(h)
        if self.codebook is None:
            self._start(x)
        elif self._due():
            self._renew()
        assert self.codebook is not None and self.averages is not None and self.sent is not None
        coded = ops.vq_encode(x, self.sent, _CANDIDATES)
        unused = _UNUSED * len(x) / self.codewords
        # An average over few batches at first, when activations change most.
        decay = min(_DECAY, 1 - 1 / (self.batches + 2))
        self.batches += 1
        ops.vq_update(
            self.codebook, self.averages, coded.counts, coded.sums, coded.candidates, decay, 1e-5, unused
        )
        moved = (self.codebook - self.sent).square().sum(2)
        self.drifts.append(Late((self.averages.counts * moved).sum() / coded.squared_error))
        tensors: tuple[Tensor, ...] = (coded.codes,)
        self.code_bytes += coded.codes.nbytes
        if self._unsent:
            tensors = (coded.codes, self.sent.bfloat16())
            self.codebook_bytes += tensors[1].nbytes
            self._unsent = False
        return Encoded(tensors, Layout.of(h), self.version)

    def decode(self, encoded: Encoded) -> Tensor:
        codes, *rest = encoded.tensors
        layout = encoded.layout
        if len(layout.shape) < 2:
            raise CodecError(f"{self.name}: expected rows of channels, got shape {list(layout.shape)}")
        channels = layout.shape[1] if len(layout.shape) == 4 else layout.shape[-1]
        if rest and (len(rest) > 1 or rest[0].dtype != torch.bfloat16):
            raise CodecError(f"{self.name}: expected a codebook in bf16, got {[t.dtype for t in rest]}")
        known = rest[0].float() if rest else self.known
        if known is None or (not rest and encoded.version != self.known_version):
            raise CodecError(f"{self.name}: expected codebook {self.known_version}, got {encoded.version}")
        whole = channels > 0 and channels % self.depth == 0
        if not whole or known.shape != (channels // self.depth, self.codewords, self.depth):
            raise CodecError(
                f"{self.name}: a codebook {list(known.shape)} does not belong to {channels} channels"
            )
        self.known, self.known_version = known, encoded.version
        dtype = layout.dtype if layout.dtype in _FLOATS else torch.float32
        try:
            x = ops.vq_decode(codes, self.known, layout.size // channels, dtype)
        except (ValueError, TypeError) as error:
            raise CodecError(f"{self.name}: {error}") from None
        return _from_rows(x, layout)

    def state(self) -> dict[str, Any]:
        saved: dict[str, Any] = {"version": self.version, "known_version": self.known_version}
        saved |= {name: getattr(self, name) for name in _COUNTERS}
        saved["drifts"] = [d.value() for d in self.drifts]
        if self.codebook is not None and self.averages is not None and self.sent is not None:
            saved |= {"codebook": self.codebook, "sent": self.sent}
            saved |= {"counts": self.averages.counts, "sums": self.averages.sums}
        if self.known is not None:
            saved["known"] = self.known
        return saved

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.version, self.known_version = state["version"], state["known_version"]
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.drifts = deque(Late(torch.tensor(v)) for v in state["drifts"])

        def place(name: str) -> Tensor | None:
            return state[name].to(device).clone() if name in state else None

        self.codebook, self.sent, self.known = place("codebook"), place("sent"), place("known")
        counts, sums = place("counts"), place("sums")
        self.averages = None if counts is None or sums is None else ops.VQState(counts, sums)

    def _start(self, x: Tensor) -> None:
        """k-means of the first batch, from a few rows spread over it and vectors drawn by their error."""
        few = max(2, self.codewords // 8)
        chosen = torch.arange(few, device=x.device) * len(x) // few
        words = x[chosen].float().view(few, -1, self.depth).transpose(0, 1).contiguous()
        while words.shape[1] < self.codewords:
            more = min(words.shape[1], self.codewords - words.shape[1], ops.vq.MAX_CANDIDATES)
            words = torch.cat((words, ops.vq_encode(x, words, more).candidates), 1)
        self.codebook = words
        for _ in range(_FIRST_ROUNDS):
            self.averages = ops.VQState(
                torch.zeros_like(self.codebook[..., 0]), torch.zeros_like(self.codebook)
            )
            coded = ops.vq_encode(x, self.codebook, _CANDIDATES)
            ops.vq_update(
                self.codebook, self.averages, coded.counts, coded.sums, coded.candidates, 0.0, 1e-5, 0.5
            )
        self._renew()

    def _renew(self) -> None:
        assert self.codebook is not None
        self.sent = self.codebook.bfloat16().float()
        self.version += 1
        self._unsent = True

    def _due(self) -> bool:
        if len(self.drifts) < 2:
            return False
        drift = self.drifts.popleft().value()
        assert self.codebook is not None
        more = self.codebook_bytes + self.codebook.numel() * 2
        # NaN, of an error of 0, is not above.
        if drift > _DRIFT and more <= _SHARE * (self.code_bytes + more):
            # What is on its way was measured against the old one.
            self.drifts.clear()
            return True
        return False


def _rows(h: Tensor) -> Tensor:
    """[rows, C], a view where channels lie last in memory."""
    x = h.permute(0, 2, 3, 1) if h.dim() == 4 else h
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype in _FLOATS else x.float()


def _from_rows(x: Tensor, layout: Layout) -> Tensor:
    shape = layout.shape
    if len(shape) == 4:
        samples, channels, height, width = shape
        x = x.view(samples, height, width, channels).permute(0, 3, 1, 2)
    x = x.view(shape)
    if x.dtype == layout.dtype and x.stride() == layout.stride:
        return x
    return torch.empty_strided(shape, layout.stride, dtype=layout.dtype, device=x.device).copy_(x)
