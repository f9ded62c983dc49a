"""Order, augmentation and resumption of batches."""

import pytest
import torch
from torch import Tensor

from lct_fast.data import Batches, DataError


def images(count: int = 23, channels: int = 3, side: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, channels, side, side + 2), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(count)


def make(augment: str = "crop_flip", batch_size: int = 4, **options: object) -> Batches:
    pixels, labels = images()
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "seed": 3, **options}
    return Batches(pixels, labels, batch_size, augment=augment, **settings)


def collect(batches: Batches, epoch: int, start: int = 0) -> list[tuple[int, Tensor, Tensor]]:
    return list(batches.epoch(epoch, start))


def naive_batch(batches: Batches, pixels: Tensor, epoch: int, index: int) -> Tensor:
    """Pad, crop, flip and normalise one sample at a time."""
    order, codes = batches.draws(epoch)
    assert codes is not None
    mean, std = torch.tensor([0.5, 0.4, 0.3]).double(), torch.tensor([0.2, 0.3, 0.25]).double()
    out = []
    for position in range(index * batches.batch_size, min((index + 1) * batches.batch_size, len(order))):
        image = pixels[order[position]].double() / 255
        channels, height, width = image.shape
        padded = torch.zeros(channels, height + 8, width + 8, dtype=torch.float64)
        padded[:, 4:-4, 4:-4] = image
        code = int(codes[position])
        dy, dx, flip = code // 18, code // 2 % 9, code % 2
        crop = padded[:, dy : dy + height, dx : dx + width]
        if flip:
            crop = crop.flip(-1)
        out.append((crop - mean[:, None, None]) / std[:, None, None])
    return torch.stack(out)


def test_crop_and_flip_match_a_loop_over_samples() -> None:
    pixels, _ = images()
    batches = make()
    for index, x, _ in batches.epoch(2):
        assert x.dtype == torch.float32 and x.is_contiguous()
        # Two roundings of float32 at magnitudes up to 1 / std.
        torch.testing.assert_close(x.double(), naive_batch(batches, pixels, 2, index), rtol=0, atol=2e-6)


def test_every_shift_and_both_sides_are_drawn() -> None:
    pixels = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    batches = Batches(pixels, torch.arange(4000), 10, mean=[0], std=[1], augment="crop_flip")
    codes = batches.draws(0)[1]
    assert codes is not None
    counts = torch.bincount(codes, minlength=162)
    # 24.7 expected in each of 162 cells; a missing shift would leave a zero, a bias would go far above.
    assert counts.shape == (162,) and int(counts.min()) > 5 and int(counts.max()) < 55


def test_without_augmentation_pixels_are_only_normalised() -> None:
    pixels, labels = images()
    batches = make("none", shuffle=False)
    x = torch.cat([x for _, x, _ in batches.epoch(0)])
    y = torch.cat([y for _, _, y in batches.epoch(0)])
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    assert torch.equal(y, labels)
    torch.testing.assert_close(x, (pixels / 255 - mean) / std, rtol=0, atol=2e-6)


def test_an_epoch_is_a_permutation_that_differs_from_the_next() -> None:
    batches = make("none")
    first, second = (torch.cat([y for _, _, y in batches.epoch(e)]).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert first != list(range(23))
    other = torch.cat([y for _, _, y in make("none", seed=4).epoch(0)]).tolist()
    assert other != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 9])
def test_resuming_gives_the_tail(start: int, drop_last: bool) -> None:
    whole = collect(make(drop_last=drop_last), 7)
    tail = collect(make(drop_last=drop_last), 7, start)
    assert [index for index, _, _ in whole] == list(range(5 if drop_last else 6))
    assert len(tail) == max(0, len(whole) - start)
    for (i, x, y), (j, u, v) in zip(whole[start:], tail, strict=True):
        assert i == j
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_batches_do_not_depend_on_what_came_before() -> None:
    used = make()
    collect(used, 0)
    torch.manual_seed(99)
    torch.rand(3)
    fresh = make()
    for (_, x, y), (_, u, v) in zip(used.epoch(1), fresh.epoch(1), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(make(), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_last_batch_is_short_or_dropped() -> None:
    assert len(make()) == 6
    assert [len(y) for _, _, y in make().epoch(0)] == [4, 4, 4, 4, 4, 3]
    assert len(make(drop_last=True)) == 5
    assert [len(y) for _, _, y in make(drop_last=True).epoch(0)] == [4] * 5


def test_draws_are_made_on_the_cpu_whatever_the_device() -> None:
    """The meta device computes nothing: what is drawn for it is what is drawn for the CPU."""
    order, codes = make(device="meta").draws(3)
    expected_order, expected_codes = make().draws(3)
    assert order.device.type == "cpu"
    assert codes is not None and expected_codes is not None
    assert torch.equal(order, expected_order)
    assert torch.equal(codes, expected_codes)


def test_batches_are_made_on_the_device() -> None:
    for _, x, y in make(device="meta").epoch(0, start=5):
        assert x.device.type == y.device.type == "meta"
        assert x.shape == (3, 3, 9, 11)


def test_a_gpu_gives_the_same_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for (_, x, y), (_, u, v) in zip(make().epoch(0), make(device="cuda").epoch(0), strict=True):
        assert torch.equal(x, u.cpu())
        assert torch.equal(y, v.cpu())


def test_the_thread_count_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = collect(make(), 0)
        torch.set_num_threads(3)
        three = collect(make(), 0)
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(x, u) and torch.equal(y, v) for (_, x, y), (_, u, v) in zip(one, three, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "rotate"}, "expected one of none, crop_flip"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"batch_size": 24, "drop_last": True}, "one full batch of 24, got 23"),
        ({"mean": [0.5]}, "expected 3 values"),
        ({"std": [0.1, 0.0, 0.2]}, "std above 0"),
        ({"classes": 22}, r"labels 0\.\.21, got 0\.\.22"),
    ],
)
def test_wrong_arguments(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_wrong_tensors() -> None:
    pixels, labels = images()
    with pytest.raises(DataError, match="uint8 images"):
        Batches(pixels.float(), labels, 4, mean=[0] * 3, std=[1] * 3)
    with pytest.raises(DataError, match="labels 0 or more"):
        Batches(pixels, labels - 1, 4, mean=[0] * 3, std=[1] * 3)


def test_a_negative_epoch_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="epoch, start"):
        make().epoch(-1)
    with pytest.raises(ValueError, match="epoch, start"):
        make().epoch(0, start=-1)
