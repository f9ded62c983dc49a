"""vq_update on every backend: the formulas in float64, revival, and a codebook that learns."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lct_fast import _native, ops
from tests.ladder import Place, assert_rule, assert_same_bits
from tests.ops.vq_case import everywhere, make

EPS = torch.finfo(torch.float32).eps


@dataclass
class Update:
    codebook: Tensor
    state: ops.VQState
    counts: Tensor
    sums: Tensor
    candidates: Tensor
    revive_below: float = 0.0
    decay: float = 0.9
    eps: float = 1e-5

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Update":
        """A copy of everything, floats in dtype."""
        c, s, sums, r = (
            x.to(device, dtype, copy=True)
            for x in (self.codebook, self.state.sums, self.sums, self.candidates)
        )
        n, counts = self.state.counts.to(device, dtype, copy=True), self.counts.to(device)
        return Update(c, ops.VQState(n, s), counts, sums, r, self.revive_below, self.decay, self.eps)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        ops.vq_update(
            self.codebook, self.state, self.counts, self.sums, self.candidates,
            self.decay, self.eps, self.revive_below,
        )  # fmt: skip
        return self.codebook, *self.state


def made(groups: int, codewords: int, depth: int, slots: int = 16, revive_below: float = 0.0) -> Update:
    draw = torch.Generator().manual_seed(codewords)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    state = ops.VQState(
        torch.rand(groups, codewords, generator=draw) * 10, randn(groups, codewords, depth) * 10
    )
    counts = torch.randint(0, 20, (groups, codewords), generator=draw)
    sums = randn(groups, codewords, depth) * counts[..., None]
    candidates = randn(groups, slots, depth)
    candidates[:, 1::3] = float("nan")
    return Update(randn(groups, codewords, depth), state, counts, sums, candidates, revive_below)


@everywhere
@pytest.mark.parametrize("revive_below", [0.0, 4.0, 1e6])
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 5, 7), (2, 257, 4), (1, 4096, 3), (1, 64, 128)], ids=str)
def test_within_the_error_rule(place: Place, shape: tuple[int, int, int], revive_below: float) -> None:
    update = made(*shape, revive_below=revive_below)
    with ops.use_backend("reference"):
        exact = update.to(torch.float64).run()
        plain = update.to(torch.float32).run()
    got = update.to(torch.float32, place.device).run()
    for name, a, b, c in zip(("codebook", "counts", "sums"), got, plain, exact, strict=True):
        assert_rule(name, a, b, c, 8 * EPS)


@everywhere
@pytest.mark.parametrize("slots", [0, 1, 2, 7])
def test_unused_words_take_candidates_in_order(place: Place, slots: int) -> None:
    update = made(2, 20, 3, slots, revive_below=1e9).to(torch.float32, place.device)
    before = update.codebook.clone()
    codebook, counts, _ = update.run()
    for group in range(2):
        finite = update.candidates[group][update.candidates[group].isfinite().all(1)]
        assert torch.equal(codebook[group, : len(finite)], finite)
        assert bool((counts[group, : len(finite)] == 1e9).all())
        assert bool((codebook[group, len(finite) :] != before[group, len(finite) :]).all())
        assert bool((counts[group, len(finite) :] < 1e9).all())


@everywhere
def test_a_revived_word_stays_where_it_was_put(place: Place) -> None:
    """Its average was reset with it: an update without rows leaves it there, and leaves it alive."""
    update = made(1, 8, 4, 16).to(torch.float32, place.device)
    update.state.counts[0, 3] = update.counts[0, 3] = 0
    update.sums[0, 3], update.revive_below, update.eps = 0, 0.5, 0.0
    candidate = update.candidates[0, 0].clone()
    update.run()
    assert torch.equal(update.codebook[0, 3], candidate)
    update.counts.zero_()
    update.sums.zero_()
    update.run()
    torch.testing.assert_close(update.codebook[0, 3], candidate)
    assert float(update.state.counts[0, 3]) > 0.5


@everywhere
def test_the_first_state_keeps_the_codebook(place: Place) -> None:
    case = make(0, 2, 7, 3, device=place.device)
    codebook, state, out = case.codebook.clone(), ops.vq_state(case.codebook), case.run()
    ops.vq_update(codebook, state, out.counts, out.sums, out.candidates, decay=0.5, eps=0.0)
    torch.testing.assert_close(codebook, case.codebook)
    assert bool((state.counts == 0.5).all())


@everywhere
def test_a_group_without_any_count_keeps_its_words(place: Place) -> None:
    update = made(2, 5, 3).to(torch.float32, place.device)
    for x in (update.state.counts[1], update.state.sums[1], update.counts[1], update.sums[1]):
        x.zero_()
    before = update.codebook.clone()
    update.run()
    assert torch.equal(update.codebook[1], before[1]) and not torch.equal(update.codebook[0], before[0])


@everywhere
def test_nothing_but_codebook_and_state_is_written(place: Place) -> None:
    update = made(2, 20, 3, revive_below=5.0).to(torch.float32, place.device)
    kept = [x.clone() for x in (update.counts, update.sums, update.candidates)]
    update.run()
    for a, b in zip(kept, (update.counts, update.sums, update.candidates), strict=True):
        assert_same_bits("input", a, b)


@everywhere
def test_updates_bring_the_words_to_the_rows(place: Place) -> None:
    """Rows around 12 centres, words that all start far off on one side: revival spreads them over the centres."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 4, generator=draw) * 4
    rows = centres[torch.randint(0, 12, (3000,), generator=draw)]
    x = (rows + 0.1 * torch.randn(3000, 4, generator=draw)).to(place.device)
    codebook = (torch.randn(1, 16, 4, generator=draw) * 0.01 + 20).to(place.device)
    state = ops.vq_state(codebook)
    for _ in range(40):
        out = ops.vq_encode(x, codebook)
        ops.vq_update(codebook, state, out.counts, out.sums, out.candidates, decay=0.5, revive_below=1.0)
    out = ops.vq_encode(x, codebook)
    spread = float((x - x.mean(0)).square().sum())
    # Candidates that all came from one place, such as the rows with the largest errors, leave a third of it.
    assert float(out.squared_error) < 0.05 * spread


def test_cpu_gives_the_same_bits_for_any_thread_count() -> None:
    update = made(5, 257, 9, revive_below=4.0)
    native = _native.load()
    assert native is not None, _native.why_absent()
    with ops.use_backend("cpu"):
        first = update.to(torch.float32).run()
        for count in (2, 3):
            torch.set_num_threads(count)
            for a, b in zip(first, update.to(torch.float32).run(), strict=True):
                assert_same_bits("update", a, b)
