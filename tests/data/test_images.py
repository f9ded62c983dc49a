"""Trees of images of any classes and sizes."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lct_fast import data
from lct_fast.data.decode import decode, encoding
from tests.data.generated import Tree, encode, pixels, tree, write_archive, write_folder

CLASSES = ["ant", "bee", "cow"]


def splits(
    side: int = 8, channels: int = 3, second: str = "test"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        "train": (pixels(12, side, channels, seed=1), np.repeat(np.arange(3), 4)),
        second: (pixels(6, side, channels, seed=2), np.repeat(np.arange(3), 2)),
    }


def files(side: int = 8, channels: int = 3, extension: str = "png") -> Tree:
    return tree(splits(side, channels), CLASSES, extension)


def refuse(spec: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=words) as caught:
        data.load(spec, cache=tmp_path / "unused-cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unused-cache").exists()


@pytest.mark.parametrize("extension", ["png", "bmp", "webp"])
@pytest.mark.parametrize("ending", ["", ".tar.xz", ".zip"])
def test_a_tree_of_any_classes(tmp_path: Path, extension: str, ending: str) -> None:
    path = tmp_path / f"animals{ending}"
    (write_archive if ending else write_folder)(path, files(extension=extension))
    loaded = data.load(f"images:{path}")
    assert loaded.name == path.name
    assert loaded.classes == CLASSES
    assert np.array_equal(loaded.train_images, splits()["train"][0].transpose(0, 3, 1, 2))
    assert np.array_equal(loaded.test_images, splits()["test"][0].transpose(0, 3, 1, 2))
    assert loaded.train_labels.tolist() == splits()["train"][1].tolist()
    assert loaded.test_labels.tolist() == splits()["test"][1].tolist()


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "JPG"])
def test_jpeg_names(tmp_path: Path, extension: str) -> None:
    some = {name.replace("png", extension): raw for name, raw in files(extension="jpg").items()}
    some = {name.rsplit(".", 1)[0] + f".{extension}": raw for name, raw in some.items()}
    assert data.load(f"images:{write_folder(tmp_path / 'x', some)}").train_images.shape == (12, 3, 8, 8)


def test_gray_images_keep_one_channel(tmp_path: Path) -> None:
    loaded = data.load(f"images:{write_folder(tmp_path / 'x', files(channels=1))}")
    assert np.array_equal(loaded.train_images[:, 0], splits(channels=1)["train"][0])
    assert loaded.in_channels == 1
    assert loaded.mean.shape == (1,)


def test_one_colour_image_makes_all_of_them_rgb(tmp_path: Path) -> None:
    some = files(channels=1)
    some["test/cow/0005.png"] = encode(pixels(1, 8)[0])
    loaded = data.load(f"images:{write_folder(tmp_path / 'x', some)}")
    gray = torch.from_numpy(splits(channels=1)["train"][0])
    assert torch.equal(loaded.train_images, gray[:, None].expand(-1, 3, -1, -1))


def test_val_stands_in_for_test_but_test_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", tree(splits(second="val"), CLASSES))
    assert len(data.load(f"images:{tmp_path / 'x'}").test_labels) == 6
    more = {"test": (pixels(3, 8, seed=9), np.arange(3))}
    write_folder(tmp_path / "x", tree(more, CLASSES))
    assert np.array_equal(
        data.load(f"images:{tmp_path / 'x'}").test_images[0], more["test"][0][0].transpose(2, 0, 1)
    )


def test_without_splits_a_tenth_is_held_out(tmp_path: Path) -> None:
    images, labels = pixels(60, 8), np.repeat(np.arange(3), 20)
    some = {name.removeprefix("all/"): raw for name, raw in tree({"all": (images, labels)}, CLASSES).items()}
    loaded = data.load(f"images:{write_folder(tmp_path / 'x', some)}")
    assert torch.bincount(loaded.train_labels).tolist() == [18] * 3
    assert torch.bincount(loaded.test_labels).tolist() == [2] * 3
    again = data.load(f"images:{write_archive(tmp_path / 'x.tar', some)}")
    assert torch.equal(again.test_images, loaded.test_images)
    both = torch.cat([loaded.train_images, loaded.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 60


@pytest.mark.parametrize(("width", "height"), [(20, 10), (10, 20), (10, 10), (13, 10)])
def test_an_image_with_one_right_side_is_only_cropped(width: int, height: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, top = (width - 10) // 2, (height - 10) // 2
    assert np.array_equal(decode(encode(image), "", 10), image[top : top + 10, left : left + 10])


@pytest.mark.parametrize("upright", [False, True])
def test_resizing_halves_a_ramp_around_its_middle(upright: bool) -> None:
    """40 x 20 to 10 x 10: columns 10..29 of a ramp, two at a time."""
    image = np.broadcast_to(np.arange(40, dtype=np.uint8) * 6, (20, 40))
    out = decode(encode(np.ascontiguousarray(image.T if upright else image)), "", 10).astype(int)
    # A ramp averaged symmetrically stays a ramp; one for rounding.
    assert np.abs((out.T if upright else out) - (np.arange(10, 30, 2) + 0.5) * 6).max() <= 1


def test_a_size_makes_one_of_many(tmp_path: Path) -> None:
    some = files()
    some["train/ant/0000.png"] = encode(pixels(1, 17)[0])
    path = write_folder(tmp_path / "x", some)
    refuse(f"images:{path}", r"one size, got 17x17 in train/ant/0000.png and 8x8.*\?size=64", tmp_path)
    loaded = data.load(f"images:{path}?size=8")
    assert loaded.train_images.shape == (12, 3, 8, 8)
    # An image that has the size already is not touched.
    assert np.array_equal(loaded.train_images[1], splits()["train"][0][1].transpose(2, 0, 1))
    assert data.load(f"images:{path}?size=6").test_images.shape == (6, 3, 6, 6)


def test_a_path_with_a_question_mark(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "what?" / "x", files())
    assert data.load(f"images:{path}").train_images.shape == (12, 3, 8, 8)


def test_deeper_folders_and_links_belong_to_their_class(tmp_path: Path) -> None:
    some = files()
    some["train/ant/more/deep/0.png"] = encode(pixels(1, 8)[0])
    path = write_folder(tmp_path / "x", some)
    os.rename(path / "train" / "bee", tmp_path / "elsewhere")
    (path / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (path / "train" / "cow" / "loop").symlink_to(path / "train")
    assert torch.bincount(data.load(f"images:{path}").train_labels).tolist() == [5, 4, 4]


@pytest.mark.parametrize("ending", ["", ".tar"])
@pytest.mark.parametrize(
    ("remove", "add", "words"),
    [
        ("test/", {}, r"expected a folder test/ \(or val/\), got train"),
        ("train/", {}, "expected a folder train/, got test"),
        ("test/bee/", {}, "the 3 class folders ant, bee, cow in test/, missing bee, unexpected none"),
        ("train/bee/", {}, "the 2 class folders ant, cow in test/, missing none, unexpected bee"),
        ("none", {"train/0.png": b"x"}, "an image outside a class folder, train/0.png"),
        ("t", {"a.txt": b"x"}, r"expected images \(.png, .*got none"),
        ("t", {"train/a/0.gif": b"x", "test/a/0.gif": b"x"}, r"expected images \(.png, .*got none"),
    ],
)
def test_layouts_that_are_wrong(tmp_path: Path, ending: str, remove: str, add: Tree, words: str) -> None:
    some = {**{name: raw for name, raw in files().items() if not name.startswith(remove)}, **add}
    path = tmp_path / f"x{ending}"
    (write_archive if ending else write_folder)(path, some)
    refuse(f"images:{path}", words, tmp_path)


def test_an_empty_class(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "x", files())
    (path / "train" / "dog").mkdir()
    refuse(f"images:{path}", "in every class folder, got none in train/: dog", tmp_path)


def test_one_class_or_one_image(tmp_path: Path) -> None:
    one = {name: raw for name, raw in files().items() if "/ant/" in name}
    refuse(f"images:{write_folder(tmp_path / 'x', one)}", "two or more class folders, got ant", tmp_path)
    lonely = {
        "a/0.png": encode(pixels(1, 8)[0]),
        "b/0.png": encode(pixels(1, 8)[0]),
        "b/1.png": encode(pixels(1, 8)[0]),
    }
    refuse(
        f"images:{write_folder(tmp_path / 'y', lonely)}", "two or more images per class.*one in a", tmp_path
    )


@pytest.mark.parametrize("extension", ["png", "bmp", "webp", "jpg"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_an_image_that_cannot_be_decoded(tmp_path: Path, extension: str, keep: float) -> None:
    some = files(side=16, extension=extension)
    name = f"train/bee/0005.{extension}"
    some[name] = some[name][: int(keep if keep >= 1 else keep * len(some[name]))]
    words = f"{name}: expected an image, got {len(some[name])} bytes"
    refuse(f"images:{write_folder(tmp_path / 'x', some)}", words, tmp_path)
    refuse(f"images:{write_archive(tmp_path / 'x.tar', some)}", words, tmp_path)


def test_other_formats_under_a_known_name(tmp_path: Path) -> None:
    """Pillow would hand PostScript to another program."""
    some = files()
    some["train/ant/0001.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    refuse(f"images:{write_folder(tmp_path / 'x', some)}", r"\(not PNG, JPEG, WEBP, BMP\)", tmp_path)


def test_sixteen_bits_a_channel(tmp_path: Path) -> None:
    some = files(channels=1)
    some["train/ant/0001.png"] = encode(pixels(1, 8, 1)[0].astype(np.uint16) * 256)
    refuse(f"images:{write_folder(tmp_path / 'x', some)}", "expected 8 bits a channel.*I;16", tmp_path)


def test_transparency_and_palettes() -> None:
    colour = pixels(1, 8, 4)[0]
    assert np.array_equal(decode(encode(colour), "", None), colour[..., :3])
    palette = Image.fromarray(pixels(1, 8)[0]).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue(), "", None), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(pixels(1, 8, 1)[0] > 127)
    buffer = io.BytesIO()
    bits.save(buffer, "PNG")
    assert set(np.unique(decode(buffer.getvalue(), "", None))) == {0, 255}


def test_encodings() -> None:
    image = pixels(1, 16)[0]
    transparent = pixels(1, 16, 4)[0]
    assert encoding(encode(image, "png")) == encoding(encode(image, "bmp")) == "lossless"
    assert encoding(encode(image, "webp")) == encoding(encode(transparent, "webp")) == "lossless"
    assert encoding(encode(image, "jpg")) == "JPEG"
    # A lossy WebP with transparency has its alpha before the pixels.
    assert encoding(encode(image, "webp", lossless=False)) == "lossy WebP"
    assert encoding(encode(transparent, "webp", lossless=False)) == "lossy WebP"


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder(tmp_path / "x", files())

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(f"images:{path}", "ant/0000.png: expected to read it, got Permission denied", tmp_path)
