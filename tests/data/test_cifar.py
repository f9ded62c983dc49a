"""CIFAR from every form: the same pixels, the same labels, and one line for what is wrong."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lct_fast import data
from lct_fast.data import ImageData
from lct_fast.data.archives import read_archive, strip_root
from lct_fast.data.cifar import choose_archives
from lct_fast.data.cifar_classes import CIFAR10_CLASSES, CIFAR100_CLASSES
from lct_fast.data.cifar_pickle import read_pickle
from lct_fast.data.decode import decode, encoding
from lct_fast.data.trees import is_image_name, is_split_name
from tests.data.generated import (
    Tree,
    cifar_binary,
    cifar_python,
    encode,
    pixels,
    rows,
    tree,
    write_archive,
    write_folder,
    write_tar,
)

Split = tuple[np.ndarray, np.ndarray]
Splits = dict[str, Split]
ENDINGS = [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"]


def assert_holds(loaded: ImageData, splits: Splits) -> None:
    """Exact pixels and labels, in the order they were generated in."""
    for split, images, labels in (
        ("train", loaded.train_images, loaded.train_labels),
        ("test", loaded.test_images, loaded.test_labels),
    ):
        assert np.array_equal(images.numpy(), splits[split][0].transpose(0, 3, 1, 2))
        assert labels.tolist() == splits[split][1].tolist()


def parts(splits: Splits) -> tuple[Split, Split]:
    return splits["train"], splits["test"]


@pytest.mark.parametrize("ending", ["", *ENDINGS])
@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_the_originals_of_cifar10(tmp_path: Path, ten: Splits, make, ending: str) -> None:
    files = make(False, *parts(ten))
    path = write_archive(tmp_path / f"x{ending}", files) if ending else write_folder(tmp_path, files)
    loaded = data.load(f"cifar10:{path}")
    assert_holds(loaded, ten)
    assert loaded.classes == CIFAR10_CLASSES
    assert loaded.name == "CIFAR-10 [30 + 10 of 50,000 + 10,000 images]"


@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_the_extracted_folder_itself(tmp_path: Path, ten: Splits, make) -> None:
    write_folder(tmp_path, make(False, *parts(ten)))
    (inner,) = tmp_path.iterdir()
    assert_holds(data.load(f"cifar10:{inner}"), ten)


@pytest.mark.parametrize("ending", ["", ".tar.gz"])
@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_the_originals_of_cifar100_give_fine_labels(
    tmp_path: Path, hundred: Splits, make, ending: str
) -> None:
    files = make(True, *parts(hundred))
    path = write_archive(tmp_path / f"a{ending}", files) if ending else write_folder(tmp_path, files)
    loaded = data.load(f"cifar100:{path}")
    assert_holds(loaded, hundred)
    assert loaded.classes == CIFAR100_CLASSES == sorted(CIFAR100_CLASSES)
    assert loaded.num_classes == 100


@pytest.mark.parametrize("ending", ["", *ENDINGS])
def test_trees_of_cifar10(tmp_path: Path, ten: Splits, ending: str) -> None:
    files = tree(ten, CIFAR10_CLASSES, "webp")
    path = write_archive(tmp_path / f"x{ending}", files) if ending else write_folder(tmp_path, files)
    loaded = data.load(f"cifar10:{path}")
    assert_holds(loaded, ten)
    assert loaded.name.startswith("CIFAR-10 [")


def test_a_tree_of_cifar100(tmp_path: Path, hundred: Splits) -> None:
    """The class "train" lies in a split of the same name."""
    path = write_tar(tmp_path / "x.tar", tree(hundred, CIFAR100_CLASSES, "bmp"), "w")
    assert_holds(data.load(f"cifar100:{path}"), hundred)


def test_a_folder_around_the_splits_is_dropped(tmp_path: Path, ten: Splits) -> None:
    files = {f"./some/where/{name}": content for name, content in tree(ten, CIFAR10_CLASSES).items()}
    files |= {"some/.DS_Store": b"x", "__MACOSX/train/cat/._0000.png": b"x", "README.txt": b"x"}
    assert_holds(data.load(f"cifar10:{write_tar(tmp_path / 'x.tar', files)}"), ten)


def test_the_order_of_members_changes_nothing(tmp_path: Path, ten: Splits) -> None:
    files = tree(ten, CIFAR10_CLASSES)
    names = sorted(files, key=lambda name: name[::-1])
    assert_holds(data.load(f"cifar10:{write_tar(tmp_path / 'x.tar', {n: files[n] for n in names})}"), ten)


@pytest.mark.parametrize(
    ("extension", "options", "name"),
    [
        ("jpg", {}, "CIFAR-10 (JPEG) ["),
        ("webp", {"lossless": False}, "CIFAR-10 (lossy WebP) ["),
        ("png", {}, "CIFAR-10 ["),
    ],
)
def test_lossy_pixels_are_named(
    tmp_path: Path, ten: Splits, extension: str, options: dict[str, bool], name: str
) -> None:
    loaded = data.load(f"cifar10:{write_folder(tmp_path, tree(ten, CIFAR10_CLASSES, extension, **options))}")
    assert loaded.name.startswith(name)


def test_jpeg_under_a_lossless_name_is_still_jpeg(tmp_path: Path, ten: Splits) -> None:
    files = tree(ten, CIFAR10_CLASSES)
    files["train/cat/0010.png"] = encode(ten["train"][0][10], "jpg")
    assert data.load(f"cifar10:{write_folder(tmp_path, files)}").name.startswith("CIFAR-10 (JPEG)")


def test_a_whole_set_has_the_plain_name(tmp_path: Path, ten: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lct_fast.data.cifar._TRAIN_COUNT", 30)
    monkeypatch.setattr("lct_fast.data.cifar._TEST_COUNT", 10)
    assert data.load(f"cifar10:{write_folder(tmp_path, tree(ten, CIFAR10_CLASSES))}").name == "CIFAR-10"


def shards(files: Tree) -> dict[str, Tree]:
    train = sorted(name for name in files if name.startswith("train/"))
    return {
        "cifar10-train-1.tar.xz": {name: files[name] for name in train[::2]},
        "cifar10-train-2.tar.xz": {name: files[name] for name in train[1::2]},
        "cifar10-test.tar.xz": {name: files[name] for name in files if name.startswith("test/")},
    }


def test_shards_are_joined_and_lossless_ones_preferred(
    tmp_path: Path, ten: Splits, hundred: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, files in shards(tree(ten, CIFAR10_CLASSES, "webp")).items():
        write_archive(tmp_path / name, files)
    write_archive(tmp_path / "cifar10-jpeg.tar.xz", tree(ten, CIFAR10_CLASSES, "jpg"))
    write_archive(tmp_path / "cifar100-jpeg90.tar.xz", tree(hundred, CIFAR100_CLASSES, "jpg"))
    (tmp_path / "notes.txt").write_text("cifar10")

    loaded = data.load(f"cifar10:{tmp_path}")
    assert_holds(loaded, ten)
    assert loaded.name.startswith("CIFAR-10 [")
    assert [Path(source).name for source in loaded.sources] == sorted(shards({}))
    said = capsys.readouterr().err
    assert "reading cifar10-test.tar.xz, cifar10-train-1.tar.xz, cifar10-train-2.tar.xz" in said
    assert "left out: cifar10-jpeg.tar.xz" in said

    assert data.load(f"cifar10:{tmp_path / 'cifar10-jpeg.tar.xz'}").name.startswith("CIFAR-10 (JPEG)")
    hundred_loaded = data.load(f"cifar100:{tmp_path}")
    assert hundred_loaded.name.startswith("CIFAR-100 (JPEG)")
    assert hundred_loaded.num_classes == 100


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        (["cifar10.zip", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"], ["cifar-10-python.tar.gz"]),
        (["cifar10_jpg.zip", "cifar-10-binary.tar.gz"], ["cifar-10-binary.tar.gz"]),
        (["cifar10_jpg.zip", "cifar100.zip", "cifar-100-python.tar.gz"], ["cifar10_jpg.zip"]),
        (["CIFAR10-b.tar", "cifar_10-a.tgz", "cifar10.txt"], ["CIFAR10-b.tar", "cifar_10-a.tgz"]),
        (["cifar100.zip"], []),
    ],
)
def test_which_archives_of_a_folder_are_taken(tmp_path: Path, present: list[str], taken: list[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    assert [file.name for file in choose_archives("cifar10", tmp_path)[0]] == taken


def test_an_original_archive_in_a_folder(tmp_path: Path, ten: Splits) -> None:
    write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_python(False, *parts(ten)))
    assert_holds(data.load(f"cifar10:{tmp_path}"), ten)
    write_archive(tmp_path / "cifar-10-python-copy.tar.gz", cifar_python(False, *parts(ten)))
    assert_line("cifar10", tmp_path, "expected one original archive.*copy")


def assert_line(name: str, path: Path, words: str) -> None:
    """Loading fails with one line and leaves nothing in the cache."""
    with pytest.raises(data.DataError, match=words) as caught:
        data.load(f"{name}:{path}", cache=path.parent / "unused-cache")
    assert "\n" not in str(caught.value)
    # Nothing to see but the line: the low-level error is not chained.
    assert caught.value.__cause__ is None and (
        caught.value.__context__ is None or caught.value.__suppress_context__
    )
    assert not (path.parent / "unused-cache").exists()


def test_images_that_come_twice(tmp_path: Path, ten: Splits) -> None:
    files = tree(ten, CIFAR10_CLASSES)
    write_archive(tmp_path / "cifar10.zip", files)
    write_archive(tmp_path / "cifar10-copy.tar", files)
    assert_line("cifar10", tmp_path, "every image once")


def test_missing_shards(tmp_path: Path, ten: Splits) -> None:
    for name, files in shards(tree(ten, CIFAR10_CLASSES)).items():
        if "test" not in name:
            write_archive(tmp_path / name, files)
    assert_line("cifar10", tmp_path, r"expected a folder test/ \(or val/\), got train")


def test_nothing_in_the_folder(tmp_path: Path) -> None:
    assert_line("cifar10", tmp_path, "got none of them.*cifar-10-python.tar.gz")
    archive = write_archive(tmp_path / "cifar10.zip", {"readme.txt": b"x"})
    assert_line("cifar10", archive, "got none of them; check that it is CIFAR-10")


def test_the_other_set(tmp_path: Path, ten: Splits, hundred: Splits) -> None:
    python = write_archive(tmp_path / "a.zip", cifar_python(True, *parts(hundred)))
    assert_line("cifar10", python, "got none of them; check that it is CIFAR-10")
    ten_tree = write_folder(tmp_path / "tree", tree(ten, CIFAR10_CLASSES))
    assert_line("cifar100", ten_tree, "the 100 class folders.*unexpected airplane, automobile")


@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_a_missing_batch(tmp_path: Path, ten: Splits, make) -> None:
    files = {
        name: content for name, content in make(False, *parts(ten)).items() if "data_batch_3" not in name
    }
    assert_line("cifar10", write_folder(tmp_path / "set", files), "expected data_batch_3")
    assert_line("cifar10", write_archive(tmp_path / "set.zip", files), "expected data_batch_3")


@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
@pytest.mark.parametrize("keep", [0, 1, 3000, -1])
def test_a_batch_that_is_cut_short(tmp_path: Path, ten: Splits, make, keep: int) -> None:
    files = make(False, *parts(ten))
    name = next(name for name in files if "data_batch_2" in name)
    files[name] = files[name][:keep]
    assert_line(
        "cifar10", write_folder(tmp_path / "set", files), "data_batch_2.*expected (records|a pickled)"
    )


@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_labels_out_of_range(tmp_path: Path, ten: Splits, make) -> None:
    train = (ten["train"][0], np.where(ten["train"][1] == 9, 10, ten["train"][1]))
    files = make(False, train, ten["test"])
    assert_line("cifar10", write_folder(tmp_path / "set", files), r"labels 0\.\.9, got")


@pytest.mark.parametrize("make", [cifar_python, cifar_binary])
def test_a_class_without_images_in_the_originals(tmp_path: Path, ten: Splits, make) -> None:
    test = (ten["test"][0], np.where(ten["test"][1] == 4, 5, ten["test"][1]))
    files = make(False, ten["train"], test)
    assert_line("cifar10", write_folder(tmp_path / "set", files), "got none of deer in test")


def test_a_tree_with_other_classes(tmp_path: Path, ten: Splits) -> None:
    classes = [name.replace("truck", "lorry") for name in CIFAR10_CLASSES]
    path = write_folder(tmp_path / "set", tree(ten, classes))
    assert_line("cifar10", path, "missing truck, unexpected lorry")


def test_a_tree_without_splits(tmp_path: Path, ten: Splits) -> None:
    files = {
        name.removeprefix("train/"): x for name, x in tree({"train": ten["train"]}, CIFAR10_CLASSES).items()
    }
    assert_line("cifar10", write_archive(tmp_path / "x.zip", files), "got class folders alone")


@pytest.mark.parametrize("side", [31, 64])
def test_images_of_another_size(tmp_path: Path, ten: Splits, side: int) -> None:
    files = tree(ten, CIFAR10_CLASSES)
    files["test/cat/0003.png"] = encode(pixels(1, side)[0])
    assert_line(
        "cifar10", write_folder(tmp_path / "one", files), f"32x32 in train.*{side}x{side} in test/cat"
    )
    every = {split: (pixels(len(y), side), y) for split, (_, y) in ten.items()}
    path = write_folder(tmp_path / "all", tree(every, CIFAR10_CLASSES))
    assert_line("cifar10", path, f"expected 32x32 images, got {side}x{side}")


def test_a_gray_image_among_the_others_becomes_rgb(tmp_path: Path, ten: Splits) -> None:
    files = tree(ten, CIFAR10_CLASSES)
    gray = pixels(1, channels=1)[0]
    files["test/cat/0003.png"] = encode(gray)
    image = data.load(f"cifar10:{write_folder(tmp_path, files)}").test_images[3]
    assert torch.equal(image, torch.from_numpy(gray).expand(3, 32, 32))


class Hostile:
    """Pickles as a call of something that is not ours to call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_cannot_run_anything(tmp_path: Path, ten: Splits) -> None:
    marker = tmp_path / "it-ran"
    files = cifar_python(False, *parts(ten))
    files["cifar-10-batches-py/data_batch_1"] = pickle.dumps({b"data": Hostile(marker), b"labels": [0]}, 2)
    assert_line(
        "cifar10", write_folder(tmp_path / "set", files), r"data_batch_1: .* it asks for (posix|nt)\.mkdir"
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({b"data": np.zeros((2, 3072), np.int16), b"labels": [0, 1]}, "an array that is not uint8"),
        ({b"data": np.zeros((2, 3072), object), b"labels": [0, 1]}, "an array that is not uint8"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, r"images \(2, 3071\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "for 1 labels"),
        ({b"data": np.zeros(3072, np.uint8), b"labels": [0]}, "not two-dimensional"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "bytes|no list of labels"),
        ({b"data": [0] * 3072, b"labels": [0]}, "no array of images"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "labels"),
        ([1, 2], "list indices"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "no list of labels"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, ten: Splits, content: object, words: str) -> None:
    files = cifar_python(False, *parts(ten))
    files["cifar-10-batches-py/data_batch_1"] = pickle.dumps(content, 2)
    assert_line("cifar10", write_folder(tmp_path / "set", files), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({b"data": bytearray(5)}, 5), "opcode"),
        # These would take 32 GiB and 1 TiB before the end of the file is noticed.
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo slot 2147483647 in 9 bytes"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "bytearray8|BYTEARRAY8"),
        (b"\x80\x02}", "exhausted before seeing STOP"),
    ],
)
def test_pickles_that_would_fill_the_memory(content: bytes, words: str) -> None:
    with pytest.raises(data.DataError, match=words):
        read_pickle(content, "made up", b"labels", 3072)


def test_a_pickle_in_column_order(tmp_path: Path, ten: Splits) -> None:
    files = cifar_python(False, *parts(ten))
    images, labels = ten["test"]
    content = {b"data": np.asfortranarray(rows(images)), b"labels": labels.tolist()}
    files["cifar-10-batches-py/test_batch"] = pickle.dumps(content, 2)
    assert_holds(data.load(f"cifar10:{write_folder(tmp_path, files)}"), ten)


def test_a_pickle_as_python_2_wrote_it(tmp_path: Path, ten: Splits) -> None:
    """The files from Toronto: byte strings by SHORT_BINSTRING and BINSTRING, numpy's old module path."""
    images, labels = ten["train"]
    raw = rows(images[:6]).tobytes()
    old = b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff",
            b"\xffK\x00tb\x89T",
            len(raw).to_bytes(4, "little"),
            raw,
            b"tbU\x06labels](",
            b"".join(b"K" + bytes([label]) for label in labels[:6].tolist()),
            b"eu.",
        ]
    )
    files = cifar_python(False, *parts(ten))
    files["cifar-10-batches-py/data_batch_1"] = old
    assert_holds(data.load(f"cifar10:{write_folder(tmp_path, files)}"), ten)


def shared_data() -> Path:
    """CIFAR as archives of image trees, beside the repository where somebody has put it."""
    return Path(__file__).parents[3] / "shared" / "data"


def test_a_real_shard_if_it_is_there() -> None:
    archive = shared_data() / "cifar10-test.tar.xz"
    if not archive.is_file():
        pytest.skip("no ../shared/data/cifar10-test.tar.xz")
    listing = strip_root(read_archive(archive, is_image_name), is_split_name)
    names, entries = zip(
        *((name.split("/")[1], raw) for name, raw in sorted(listing.files.items())), strict=True
    )
    assert [names.count(name) for name in CIFAR10_CLASSES] == [1000] * 10
    assert {encoding(raw) for raw in entries} == {"lossless"}
    assert {decode(raw, "", None).shape for raw in entries[::500]} == {(32, 32, 3)}
