"""Specs, the digits, and limits."""

import pytest
import torch

from lct_fast import data
from lct_fast.data.image_data import ImageData, channel_statistics, make, stratified_split, take


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return data.load("digits")


def test_names_all_have_a_form_that_load_knows() -> None:
    assert data.names() == ["digits", "cifar10", "cifar100", "images", "text"]
    for name in data.names()[1:]:
        with pytest.raises(data.DataError, match=f"expected {name}:(PATH|FILE).*say where"):
            data.load(name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mnist", "expected one of digits or digits:fold=0 .to 4., cifar10:PATH"),
        ("", "expected one of"),
        ("digits:here", "expected digits or digits:fold=0 to digits:fold=4, got 'digits:here'"),
        ("digits:fold=5", "got 'digits:fold=5'"),
        ("digits:fold=", "got 'digits:fold='"),
        ("digits:2", "got 'digits:2'"),
        ("images:?size=32", "say where"),
        ("images:x?size=0", "size=PIXELS"),
        ("images:x?size=", "size=PIXELS"),
        ("images:x?crop=3", "size=PIXELS"),
        ("cifar10:x?size=32", "images only"),
        ("images:/nowhere/at/all", "does not exist"),
        ("cifar10:/nowhere/at/all", "does not exist.*cifar-10-python.tar.gz"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, words: str) -> None:
    with pytest.raises(data.DataError, match=words) as caught:
        data.load(spec)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_digits_keep_their_values_and_split(digits: ImageData) -> None:
    assert digits.name == "digits"
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert int(digits.train_images.max()) == 16
    assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, 8, 10)
    # The split is part of every published number: it must not move.
    assert torch.bincount(digits.test_labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert digits.test_labels[:12].tolist() == data.load("digits").test_labels[:12].tolist()


def test_five_folds_test_every_digit_once() -> None:
    folds = [data.load(f"digits:fold={k}") for k in range(5)]
    tested = torch.cat([f.test_images for f in folds]).flatten(1)
    whole = torch.cat([folds[0].train_images, folds[0].test_images]).flatten(1)
    assert len(tested) == len(whole) == 1797
    assert torch.equal(
        tested.unique(dim=0, return_counts=True)[1], whole.unique(dim=0, return_counts=True)[1]
    )
    for k, fold in enumerate(folds):
        assert len(fold.train_labels) + len(fold.test_labels) == 1797
        counts = torch.bincount(fold.test_labels, minlength=10)
        assert int(counts.max() - counts.min()) <= 3
        assert torch.equal(data.load(f"digits:fold={k}").test_images, fold.test_images)


def test_digits_splits_do_not_overlap(digits: ImageData) -> None:
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    together = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert sorted(map(tuple, raw.tolist())) == sorted(map(tuple, together.tolist()))


def test_statistics_are_those_of_the_pixels(digits: ImageData) -> None:
    scaled = digits.train_images.double() / 255
    torch.testing.assert_close(digits.mean.double(), scaled.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(digits.std.double(), scaled.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_a_constant_channel_has_unit_deviation() -> None:
    mean, std = channel_statistics(torch.full((3, 2, 4, 4), 51, dtype=torch.uint8))
    assert mean.tolist() == pytest.approx([0.2, 0.2])
    assert std.tolist() == [1, 1]


@pytest.mark.parametrize("limit", [1, 10, 103, 500])
def test_a_limit_is_balanced_and_nested(digits: ImageData, limit: int) -> None:
    some = data.load("digits", limit=limit)
    counts = torch.bincount(some.train_labels, minlength=10)
    assert some.train_images.shape[0] == limit
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(some.test_images, digits.test_images)
    more = take(digits, limit + 7)
    assert torch.equal(more.train_images[:limit], some.train_images)
    assert torch.equal(more.train_labels[:limit], some.train_labels)
    assert torch.equal(some.mean, channel_statistics(some.train_images)[0])


def test_a_limit_keeps_images_and_labels_together(digits: ImageData) -> None:
    by_pixels = {
        tuple(image.flatten().tolist()): int(y)
        for image, y in zip(digits.train_images, digits.train_labels, strict=True)
    }
    some = take(digits, 200)
    for image, label in zip(some.train_images, some.train_labels, strict=True):
        assert by_pixels[tuple(image.flatten().tolist())] == int(label)


def test_a_limit_above_the_set_takes_all_of_it(digits: ImageData) -> None:
    assert take(digits, 5000) is digits
    with pytest.raises(data.DataError, match="1 or more"):
        data.load("digits", limit=0)


def test_a_rare_class_runs_out_first() -> None:
    images = torch.zeros(12, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0] * 10 + [1] * 2)
    some = take(make("uneven", images, labels, images, labels, ["a", "b"]), 7)
    assert torch.bincount(some.train_labels).tolist() == [5, 2]


def test_a_stratified_split_shares_by_proportion() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 15 + [3] * 5)
    train, test = stratified_split(labels, 10, seed=0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    # 5, 3, 1.5 and 0.5: the tie goes to the lower label, and the class left empty gets one beyond the ten.
    assert torch.bincount(labels[test], minlength=4).tolist() == [5, 3, 2, 1]
    assert not torch.equal(test, stratified_split(labels, 10, seed=1)[1])


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), "uint8 images"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "uint8 images"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one image"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), r"labels \[2\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.int32), "int64 labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), r"labels 0\.\.1, got 0\.\.2"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1, 1]), r"got -1\.\.1"),
    ],
)
def test_image_data_checks_what_it_holds(images: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    good = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    numbers = torch.tensor([0, 1])
    one = torch.ones(1)
    with pytest.raises(data.DataError, match=words):
        ImageData("made up", images, labels, good, numbers, ["a", "b"], one, one)
    with pytest.raises(data.DataError, match=words):
        ImageData("made up", good, numbers, images, labels, ["a", "b"], one, one)


def test_image_data_wants_one_shape() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(data.DataError, match="of one shape"):
        make(
            "made up",
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            labels,
            torch.zeros(2, 1, 5, 4, dtype=torch.uint8),
            labels,
            ["a", "b"],
        )
