"""Windows of a text: streams that go on, offsets, resumption."""

import pytest
import torch

from lct_fast.data import DataError, Windows

TEXT = torch.arange(100, dtype=torch.uint8)


def test_each_row_goes_on_where_it_ended_and_targets_are_one_further() -> None:
    windows = Windows(TEXT, 3, 4, seed=5)
    batches = list(windows.epoch(1))
    assert [i for i, _, _ in batches] == list(range(len(windows)))
    x, y = (torch.cat([b[k] for b in batches], 1) for k in (1, 2))
    assert x.dtype == y.dtype == torch.int64 and all(b[1].shape == (3, 4) for b in batches)
    first = windows.offset(1)
    # Rows are stretches of one length, behind each other in the text.
    assert torch.equal(x.flatten(), torch.arange(first, first + x.numel()))
    assert torch.equal(y, x + 1)
    # 96 characters less the largest offset, 3 streams, whole windows.
    assert len(windows) == 8


def test_offsets_are_drawn_for_each_epoch_and_every_one_fits() -> None:
    windows = Windows(TEXT, 3, 4, seed=5)
    offsets = [windows.offset(e) for e in range(40)]
    assert set(offsets) == {0, 1, 2, 3} and offsets == [windows.offset(e) for e in range(40)]
    assert offsets != [Windows(TEXT, 3, 4, seed=6).offset(e) for e in range(40)]
    # The smallest text for one window a stream, at every offset.
    least = Windows(TEXT[: 3 * 4 + 1 + 3], 3, 4)
    assert len(least) == 1 and all(b[1].shape == (3, 4) for e in range(40) for b in least.epoch(e))


def test_start_gives_the_tail_of_an_epoch() -> None:
    windows = Windows(TEXT, 2, 5, seed=1)
    whole, tail = list(windows.epoch(3)), list(windows.epoch(3, start=4))
    assert len(tail) == len(whole) - 4
    for (i, x, y), (j, u, v) in zip(whole[4:], tail, strict=True):
        assert i == j and torch.equal(x, u) and torch.equal(y, v)


def test_in_order_every_character_is_a_target_once() -> None:
    windows = Windows(TEXT, 2, 10, shift=False, drop_last=False)
    batches = list(windows.epoch(0))
    assert [x.shape[1] for _, x, _ in batches] == [10] * 4 + [9] and len(windows) == 5
    targets = torch.cat([y for _, _, y in batches], 1).flatten()
    # 99 have one before them, and 2 streams of 49 take 98.
    assert torch.equal(targets, torch.arange(1, 99))
    assert len(Windows(TEXT, 2, 10, shift=False, drop_last=True)) == 4


@pytest.mark.parametrize(
    ("ids", "rows", "window", "options", "words"),
    [
        (TEXT[:15], 3, 4, {}, "expected 16 characters or more for 3 streams of windows of 4, got 15"),
        (TEXT[:3], 3, 4, {"shift": False, "drop_last": False}, "expected 4 characters or more for 3 streams, got 3"),
        (TEXT, 0, 4, {}, "batch_size: expected 1 or more, got 0"),
        (TEXT, 3, 0, {}, "window: expected 1 or more, got 0"),
        (TEXT.float(), 3, 4, {}, "expected integers"),
        (TEXT.view(10, 10), 3, 4, {}, "expected integers"),
    ],
)  # fmt: skip
def test_refusals(ids: torch.Tensor, rows: int, window: int, options: dict[str, bool], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Windows(ids, rows, window, **options)
    assert isinstance(caught.value, DataError) == ("characters or more" in words)
    with pytest.raises(ValueError, match="expected 0 or more"):
        Windows(TEXT, 3, 4).epoch(-1)
