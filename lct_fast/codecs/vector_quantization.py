"""Vectors of channels as indices into a codebook that follows the activations (arXiv 2106.06401)."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.codecs.codebook_use import perplexity, used
from lct_fast.codecs.codec import Codec, CodecError, Encoded, Layout, laid_out
from lct_fast.codecs.late import Late

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# A word averages over about this many vectors, where that is 2 to 100 batches.
_VECTORS = 64
_DECAYS = (0.5, 0.99)
# Of a codebook that travels.
_KIND, _BLOCK = "int8", 64
# A word chosen less than this part of the average is unused.
_UNUSED = 0.05
_CANDIDATES = 16
_FIRST_ROUNDS = 5
# The consumer gets a new codebook when it would take away this part of the quantisation error,
_DRIFT = 0.05
# and codebooks stay below this part of all bytes.
_SHARE = 0.1
_COUNTERS = ("batches", "code_bytes", "codebook_bytes")
_KNOWN = ("known", "known_scales")


class VectorQuantization(Codec):
    """Online vector quantisation of what crosses a cut (arXiv 2106.06401).

    The C channels at each position are C / D vectors of D; each of the C / D groups has K words of its own. A vector
    travels as ceil(log2 K) bits: 32 D / log2 K times fewer than fp32. Channels are dimension 1 of [N, C, H, W] and
    the last of anything else.

    Of feature maps a vector may also be a patch: S x S neighbours of D / S^2 channels, with words for each of the
    C S^2 / D groups of channels. Neighbours resemble each other more than channels do, so the error is smaller at the
    same number of bits; codebooks are S^2 times as large.

    The codebook starts as k-means of the first batch and then follows by moving averages; unused words are given
    vectors of the batch. With M vectors a batch in each group the averages' decay is 1 - M / (64 K), within 0.5 and
    the paper's 0.99: with enough vectors for every word an older one only holds the codebook back.

    Batches are coded with the codebook the consumer has. It gets a new one, as int8 with a scale for 64 values, when
    the drift between the two, sum_k n_k |c_k - sent_k|^2 less what int8 takes away, exceeds 5 % of the quantisation
    error, unless codebooks would become more than a tenth of all bytes. A word that was just given a vector of the
    batch counts in it as an average one. The drift is read two batches late, so that no device is waited for.

    Over replicas counts, sums and errors are those of the whole batch and candidates the first replica's, so that all
    keep the same codebooks.

    Args:
        codewords: K, 2 to 65536.
        depth: D; it has to divide C S^2.
        patch: S, side of a patch; 1 for vectors of channels. S^2 has to divide D, S height and width.
    """

    def __init__(self, codewords: int = 256, depth: int = 8, patch: int = 1) -> None:
        if not 2 <= codewords <= ops.vq.MAX_CODEWORDS or depth < 1:
            raise ValueError(
                f"codec vq:K,D: expected K in 2..{ops.vq.MAX_CODEWORDS} and D >= 1, got vq:{codewords},{depth}"
            )
        if patch < 1 or depth % patch**2:
            raise ValueError(
                f"codec vq:K,D,S: expected S >= 1 whose square divides D, got vq:{codewords},{depth},{patch}"
            )
        self.codewords, self.depth, self.patch = codewords, depth, patch
        self.name = f"vq:{codewords},{depth}" + (f",{patch}" if patch > 1 else "")
        self.version = 0
        # The producer's: the codebook that moves, and the one that the consumer has.
        self.codebook: Tensor | None = None
        self.averages: ops.VQState | None = None
        self.sent: Tensor | None = None
        # [G, K]: |c_k - sent_k|^2 when it was sent.
        self.rounding: Tensor | None = None
        self.drifts: deque[Late] = deque()
        self.code_bytes = self.codebook_bytes = 0
        self.batches = 0
        # How often each word was chosen in the latest batches; what ``codebook_use`` tells, and begins anew.
        self.chosen: Tensor | None = None
        self.chosen_batches = 0
        # The codebook in use as it travels, if the consumer lacks it; never between two calls of encode.
        self._unsent: tuple[Tensor, ...] = ()
        # The consumer's, payload and scales as they came.
        self.known: tuple[Tensor, ...] = ()
        self.known_version = 0

    def check(self, shape: tuple[int, ...]) -> None:
        if self.patch > 1 and (len(shape) != 3 or shape[1] % self.patch or shape[2] % self.patch):
            raise ValueError(
                f"codec {self.name}: patches need feature maps (C, H, W) with H and W divisible by {self.patch}, got "
                f"{tuple(shape)}; use vq:{self.codewords},{self.depth}"
            )
        channels = (shape[0] if len(shape) == 3 else shape[-1]) * self.patch**2
        if channels % self.depth:
            times = f" times {self.patch**2}" if self.patch > 1 else ""
            fit = ", ".join(str(d) for d in range(2, 17) if channels % d == 0) or channels
            raise ValueError(
                f"codec {self.name}: D has to divide the channels{times}, got {channels} of {tuple(shape)}; "
                f"choose D among {fit}"
            )

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        if self.patch > 1:
            # Feature maps may change their size from batch to batch.
            self.check(tuple(h.shape[1:]))
        x = _rows(h, self.patch)
        if not learn:
            if self.sent is None:
                raise CodecError(f"{self.name}: there is no codebook before the first batch of training")
            return Encoded((ops.vq_encode(x, self.sent, 0).codes,), Layout.of(h), self.version)
        if self.codebook is None:
            self._start(x)
        elif self._due():
            self._renew()
        assert self.codebook is not None and self.averages is not None
        assert self.sent is not None and self.rounding is not None
        coded = self._coded(x, self.sent, _CANDIDATES)
        vectors = len(x) * self.replicas.count
        unused = _UNUSED * vectors / self.codewords
        # An average over few batches at first, when activations change most.
        decay = min(self.decay(vectors), 1 - 1 / (self.batches + 2))
        self.batches += 1
        self.chosen = coded.counts.clone() if self.chosen is None else self.chosen.add_(coded.counts)
        self.chosen_batches += 1
        ops.vq_update(
            self.codebook, self.averages, coded.counts, coded.sums, coded.candidates, decay, 1e-5, unused
        )
        # What int8 takes away, a new codebook would not bring back.
        moved = (self.codebook - self.sent).square().sum(2) - self.rounding
        drift = (self.averages.counts * moved).sum().clamp_(min=0)
        self.drifts.append(Late(drift / coded.squared_error))
        tensors: tuple[Tensor, ...] = (coded.codes,)
        self.code_bytes += coded.codes.nbytes
        if self._unsent:
            tensors = (coded.codes, *self._unsent)
            self.codebook_bytes += self._book_bytes()
            self._unsent = ()
        return Encoded(tensors, Layout.of(h), self.version)

    def resolve(self, encoded: Encoded) -> Encoded:
        codes, *rest = encoded.tensors
        layout = encoded.layout
        if len(layout.shape) < 2:
            raise CodecError(f"{self.name}: expected rows of channels, got shape {list(layout.shape)}")
        channels = self._channels(layout)
        if rest and [t.dtype for t in rest] != [torch.uint8, torch.bfloat16]:
            raise CodecError(
                f"{self.name}: expected a codebook as int8 and its scales, got {[t.dtype for t in rest]}"
            )
        known = tuple(rest) or self.known
        if not known or (not rest and encoded.version != self.known_version):
            raise CodecError(f"{self.name}: expected codebook {self.known_version}, got {encoded.version}")
        whole = channels > 0 and channels % self.depth == 0
        values = channels * self.codewords
        if not whole or [t.shape for t in known] != [(values,), (-(-values // _BLOCK),)]:
            raise CodecError(
                f"{self.name}: a codebook of {known[0].numel()} values does not belong to {channels} channels"
            )
        # Only a newer one is the producer's; an older one belongs to a batch that was kept for later.
        if encoded.version > self.known_version:
            # What comes over a link lies in memory that is used again.
            known = self.known = tuple(t.clone() for t in known)
            self.known_version = encoded.version
        return Encoded((codes, *known), layout, encoded.version)

    def decode(self, encoded: Encoded) -> Tensor:
        codes, *known = self.resolve(encoded).tensors
        layout = encoded.layout
        channels = self._channels(layout)
        dtype = layout.dtype if layout.dtype in _FLOATS else torch.float32
        try:
            words = _words(known[0], known[1], self.codewords, self.depth)
            x = ops.vq_decode(codes, words, layout.size // channels, dtype)
        except (ValueError, TypeError) as error:
            raise CodecError(f"{self.name}: {error}") from None
        return _from_rows(x, layout, self.patch)

    def codebook_use(self) -> dict[str, Any] | None:
        if self.chosen is None or self.chosen_batches == 0:
            return None
        drift = self.drifts[-1].value()
        use = {
            "codewords": self.codewords,
            "batches": self.chosen_batches,
            "used": used(self.chosen),
            "perplexity": perplexity(self.chosen),
            "drift": drift if math.isfinite(drift) else None,
            "codebooks": self.version,
        }
        self.chosen.zero_()
        self.chosen_batches = 0
        return use

    def state(self) -> dict[str, Any]:
        saved: dict[str, Any] = {"version": self.version, "known_version": self.known_version}
        saved |= {name: getattr(self, name) for name in _COUNTERS}
        saved["drifts"] = [d.value() for d in self.drifts]
        if self.codebook is not None and self.averages is not None and self.sent is not None:
            saved |= {"codebook": self.codebook, "sent": self.sent, "rounding": self.rounding}
            saved |= {"counts": self.averages.counts, "sums": self.averages.sums}
        if self.chosen is not None:
            saved |= {"chosen": self.chosen, "chosen_batches": self.chosen_batches}
        if self.known:
            saved |= dict(zip(_KNOWN, self.known, strict=True))
        return saved

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.version, self.known_version = state["version"], state["known_version"]
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.drifts = deque(Late(torch.tensor(v)) for v in state["drifts"])

        def place(name: str) -> Tensor | None:
            return state[name].to(device).clone() if name in state else None

        self.codebook, self.sent, self.rounding = place("codebook"), place("sent"), place("rounding")
        self.known = tuple(t for t in map(place, _KNOWN) if t is not None)
        # Checkpoints from before it was counted lack it.
        self.chosen, self.chosen_batches = place("chosen"), state.get("chosen_batches", 0)
        counts, sums = place("counts"), place("sums")
        self.averages = None if counts is None or sums is None else ops.VQState(counts, sums)

    def shared(self) -> tuple[Tensor, ...]:
        return () if self.codebook is None or self.sent is None else (self.codebook, self.sent)

    def decay(self, vectors: int) -> float:
        """Of the averages, with so many vectors a batch in each group."""
        fastest, slowest = _DECAYS
        return min(max(1 - vectors / (_VECTORS * self.codewords), fastest), slowest)

    def _channels(self, layout: Layout) -> int:
        """Values in a row of what is coded."""
        shape = layout.shape
        if self.patch > 1 and (len(shape) != 4 or shape[2] % self.patch or shape[3] % self.patch):
            raise CodecError(
                f"{self.name}: expected [N, C, H, W] with H and W divisible by {self.patch}, got {list(shape)}"
            )
        return (shape[1] if len(shape) == 4 else shape[-1]) * self.patch**2

    def _coded(self, x: Tensor, codebook: Tensor, candidates: int) -> ops.VQEncoding:
        """The rows' codes, with the statistics of all replicas' rows."""
        coded = ops.vq_encode(x, codebook, candidates)
        counts, sums, error = self.replicas.sum(coded.counts, coded.sums, coded.squared_error)
        return coded._replace(
            counts=counts,
            sums=sums,
            squared_error=error,
            candidates=self.replicas.first(coded.candidates),
        )

    def _start(self, x: Tensor) -> None:
        """k-means of the first batch, from a few rows spread over it and vectors drawn by their error."""
        few = max(2, self.codewords // 8)
        chosen = torch.arange(few, device=x.device) * len(x) // few
        rows = self.replicas.first(x[chosen].float())
        words = rows.view(few, -1, self.depth).transpose(0, 1).contiguous()
        while words.shape[1] < self.codewords:
            more = min(words.shape[1], self.codewords - words.shape[1], ops.vq.MAX_CANDIDATES)
            words = torch.cat((words, self._coded(x, words, more).candidates), 1)
        self.codebook = words
        for _ in range(_FIRST_ROUNDS):
            self.averages = ops.VQState(
                torch.zeros_like(self.codebook[..., 0]), torch.zeros_like(self.codebook)
            )
            coded = self._coded(x, self.codebook, _CANDIDATES)
            ops.vq_update(
                self.codebook, self.averages, coded.counts, coded.sums, coded.candidates, 0.0, 1e-5, 0.5
            )
        self._renew()

    def _book_bytes(self) -> int:
        """Of a codebook that travels: its values, and two for each scale."""
        assert self.codebook is not None
        return self.codebook.numel() + 2 * -(-self.codebook.numel() // _BLOCK)

    def _renew(self) -> None:
        assert self.codebook is not None
        self._unsent = _packed(self.codebook)
        self.sent = _words(*self._unsent, self.codewords, self.depth)
        self.rounding = (self.codebook - self.sent).square().sum(2)
        self.version += 1

    def _due(self) -> bool:
        if len(self.drifts) < 2:
            return False
        drift = self.drifts.popleft().value()
        more = self.codebook_bytes + self._book_bytes()
        # NaN, of an error of 0, is not above.
        if drift > _DRIFT and more <= _SHARE * (self.code_bytes + more):
            # What is on its way was measured against the old one.
            self.drifts.clear()
            return True
        return False


def _packed(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """A codebook [G, K, D] as int8 with its scales, each of one column of words: columns may differ in size."""
    return ops.block_quantize(codebook.transpose(1, 2).contiguous(), _KIND, _BLOCK)


def _words(payload: Tensor, scales: Tensor, codewords: int, depth: int) -> Tensor:
    """The codebook [G, K, D] in fp32 that came as int8."""
    flat = ops.block_dequantize(payload, scales, payload.numel(), _KIND, _BLOCK)
    return flat.view(-1, depth, codewords).transpose(1, 2).contiguous()


def _rows(h: Tensor, patch: int) -> Tensor:
    """[rows, C], a view where channels lie last in memory; of patches [rows, C S S], a channel's side by side."""
    if patch > 1:
        x = h.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        # N, H / S, W / S, C, S, S
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
    else:
        x = h.permute(0, 2, 3, 1) if h.dim() == 4 else h
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype in _FLOATS else x.float()


def _from_rows(x: Tensor, layout: Layout, patch: int) -> Tensor:
    shape = layout.shape
    if len(shape) != 4:
        return laid_out(x.view(shape), layout)
    samples, channels, height, width = shape
    if patch == 1:
        return laid_out(x.view(samples, height, width, channels).permute(0, 3, 1, 2), layout)
    x = x.view(samples, height // patch, width // patch, channels, patch, patch)
    # N, C, H / S, S, W / S, S
    return laid_out(x.permute(0, 3, 1, 4, 2, 5).reshape(shape), layout)
