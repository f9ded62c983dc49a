"""Decoded once, found again, and never trusted blindly."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lct_fast import data
from lct_fast.data import ImageData, cache
from tests.data.generated import encode, pixels, tree, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    splits = {
        "train": (pixels(8, 8, seed=1), np.repeat([0, 1], 4)),
        "test": (pixels(4, 8), np.repeat([0, 1], 2)),
    }
    return write_folder(tmp_path / "set", tree(splits, ["a", "b"]))


def assert_same(one: ImageData, other: ImageData) -> None:
    assert (one.name, one.classes, one.sources) == (other.name, other.classes, other.sources)
    for name in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def forbid_decoding(monkeypatch: pytest.MonkeyPatch):
    def arm() -> None:
        def decode(*_: object) -> None:
            raise AssertionError("decoded again")

        monkeypatch.setattr("lct_fast.data.decode.decode", decode)

    return arm


def test_the_second_time_nothing_is_decoded(folder: Path, cache_folder: Path, forbid_decoding) -> None:
    first = data.load(f"images:{folder}")
    (file,) = cache_folder.iterdir()
    assert file.name.startswith("images-") and file.suffix == ".safetensors"
    forbid_decoding()
    assert_same(data.load(f"images:{folder}"), first)
    assert data.load(f"images:{folder}", limit=4).train_labels.shape == (4,)
    with pytest.raises(AssertionError, match="decoded again"):
        data.load(f"images:{folder}?size=4")


def test_a_relative_path_finds_the_same_cache(
    folder: Path, forbid_decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.load(f"images:{folder}")
    forbid_decoding()
    monkeypatch.chdir(folder.parent)
    assert data.load("images:set").train_labels.shape == (8,)


def test_changed_sources_are_decoded_again(folder: Path, cache_folder: Path) -> None:
    before = data.load(f"images:{folder}")
    image = folder / "train" / "a" / "0000.png"
    stat = image.stat()
    fresh = pixels(1, 8, seed=77)[0]
    image.write_bytes(encode(fresh))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = data.load(f"images:{folder}")
    assert torch.equal(after.train_images[0], torch.from_numpy(fresh).permute(2, 0, 1))
    assert not torch.equal(after.train_images[0], before.train_images[0])
    (folder / "train" / "b" / "9.png").write_bytes(encode(fresh))
    assert data.load(f"images:{folder}").train_labels.shape == (9,)
    assert len(list(cache_folder.iterdir())) == 3


def damage_cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def damage_pixel(raw: bytes) -> bytes:
    # Somewhere in the pixels, where only a checksum can tell.
    return raw[:-200] + bytes([raw[-200] ^ 1]) + raw[-199:]


def damage_all(raw: bytes) -> bytes:
    return b"not a cache"


def damage_header(raw: bytes) -> bytes:
    return raw.replace(b"lct_fast", b"lct_fist", 1)


@pytest.mark.parametrize("damage", [damage_cut, damage_pixel, damage_all, damage_header, lambda raw: b""])
def test_a_damaged_cache_is_rebuilt_with_one_line(
    folder: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture, damage
) -> None:
    first = data.load(f"images:{folder}")
    (file,) = cache_folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert_same(data.load(f"images:{folder}"), first)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "damaged cache" in record.getMessage() and "\n" not in record.getMessage()
    assert file.read_bytes() == good
    caplog.clear()
    assert_same(data.load(f"images:{folder}"), first)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a-file"
    blocked.touch()
    assert data.load(f"images:{folder}", cache=blocked / "below").train_labels.shape == (8,)
    (record,) = caplog.records
    assert "cannot write the cache" in record.getMessage()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def save_half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", save_half)
    if isinstance(error, OSError):
        data.load(f"images:{folder}")
    else:
        with pytest.raises(KeyboardInterrupt):
            data.load(f"images:{folder}")
    assert list(cache_folder.iterdir()) == []


def test_a_full_disk_as_safetensors_reports_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert data.load(f"images:{folder}").train_labels.shape == (8,)
    assert "cannot write the cache (No space left on device)" in caplog.text


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LCT_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path
    monkeypatch.setenv("LCT_CACHE", "")
    assert cache.default_folder() == Path.home() / ".cache" / "lct_fast"


def test_an_explicit_folder_wins(folder: Path, tmp_path: Path, cache_folder: Path) -> None:
    data.load(f"images:{folder}", cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert list(cache_folder.iterdir()) == []
