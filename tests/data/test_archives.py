"""Archives: what is read, and what is refused."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from lct_fast.data import DataError
from lct_fast.data.archives import Listing, hidden, read_archive, strip_root
from tests.data.generated import write_archive, write_tar, write_zip

ENDINGS = [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"]
# Bytes that don't compress, so that damage anywhere hits something.
FILES = {
    f"train/{name}/{n}.png": bytes((n * 7 + i * i) % 251 for i in range(3000))
    for name in "ab"
    for n in range(4)
}


def everything(name: str) -> bool:
    return True


def refuse(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_archive(path, everything)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_come_back(tmp_path: Path, ending: str) -> None:
    assert read_archive(write_archive(tmp_path / f"x{ending}", FILES), everything).files == FILES


def test_the_content_tells_the_format(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.zip", FILES).rename(tmp_path / "x.tar.gz")
    assert read_archive(path, everything).files == FILES


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_wanted_members_are_read(tmp_path: Path, ending: str) -> None:
    path = write_archive(tmp_path / f"x{ending}", {**FILES, "notes.txt": b"x", ".hidden/a.png": b"x"})
    assert set(read_archive(path, lambda name: name.endswith("1.png")).files) == {
        "train/a/1.png",
        "train/b/1.png",
    }
    assert ".hidden/a.png" not in read_archive(path, everything).files


def test_folders_are_listed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("./train/empty/")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        zipped.mkdir("train/empty")
    for name in ("x.tar", "x.zip"):
        assert read_archive(tmp_path / name, everything).folders == {"train/empty"}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_cut_archive(tmp_path: Path, ending: str, share: float) -> None:
    path = write_archive(tmp_path / f"x{ending}", FILES)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refuse(path, "expected a whole")


def test_a_tar_cut_between_two_members(tmp_path: Path) -> None:
    """tarfile itself takes this for a whole archive."""
    path = write_archive(tmp_path / "x.tar", FILES)
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:offset])
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 3
    refuse(path, f"no end mark after {offset} bytes")


def test_a_tar_with_a_damaged_header(tmp_path: Path) -> None:
    """tarfile stops there without a word."""
    path = write_archive(tmp_path / "x.tar", FILES)
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[3].offset
    raw = bytearray(path.read_bytes())
    raw[offset + 5] ^= 0xFF
    path.write_bytes(raw)
    refuse(path, "no end mark")


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".tar.bz2", ".zip"])
def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path, ending: str) -> None:
    path = write_archive(tmp_path / f"x{ending}", FILES)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    refuse(path, "expected (a whole|names inside|plain files)")


def test_the_checksum_behind_the_last_member_counts(tmp_path: Path) -> None:
    """gzip keeps it in the last eight bytes, after everything that a tar reader needs."""
    path = write_archive(tmp_path / "x.tar.gz", FILES)
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1
    path.write_bytes(raw)
    refuse(path, "CRC check failed")


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_text("hello, I am a text file\n" * 100)
    refuse(path, "expected a whole tar")
    refuse(tmp_path, "expected a whole tar")


@pytest.mark.parametrize("ending", [".tar", ".zip"])
@pytest.mark.parametrize(
    "name", ["../outside.png", "train/../../outside.png", "/etc/outside.png", "C:/outside.png"]
)
def test_names_that_reach_outside(tmp_path: Path, ending: str, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_archive(folder / f"x{ending}", {"train/a/0.png": b"x", name: b"y"})
    refuse(path, "expected names inside the archive")
    assert [file.name for file in tmp_path.rglob("*")] == ["in", path.name]


def test_backslashes_are_slashes(tmp_path: Path) -> None:
    refuse(write_tar(tmp_path / "x.tar", {"train\\..\\..\\outside.png": b"x"}), "expected names inside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("train/a/0.png")
        member.type = kind
        member.linkname = "/etc/passwd"
        archive.addfile(member)
    refuse(tmp_path / "x.tar", "a link or device train/a/0.png")


@pytest.mark.parametrize("ending", [".tar", ".zip"])
def test_a_member_that_is_too_large(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lct_fast.data.archives._MAX_MEMBER", 2999)
    refuse(write_archive(tmp_path / f"x{ending}", FILES), "give the folder")


def test_a_name_that_comes_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"one", b"two"):
            member = tarfile.TarInfo("train/a/0.png")
            member.size = 3
            archive.addfile(member, io.BytesIO(content))
    refuse(tmp_path / "x.tar", "train/a/0.png twice")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"train/a/0.png": b"x"})
    raw = bytearray(path.read_bytes())
    # Bit 0 of the flags, in the local header and in the directory.
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    refuse(path, "encrypted")


def test_roots_are_stripped_down_to_a_split() -> None:
    listing = Listing({"a/b/train/x/0.png": b"", "a/b/train/y/0.png": b""}, {"a", "a/b", "a/b/train"})
    stripped = strip_root(listing, lambda name: name == "train")
    assert set(stripped.files) == {"train/x/0.png", "train/y/0.png"}
    assert stripped.folders == {"train"}
    assert strip_root(Listing({"0.png": b""}), everything).files == {"0.png": b""}
    assert strip_root(Listing(), everything) == Listing()


@pytest.mark.parametrize("name", [".git/a.png", "train/.DS_Store", "__MACOSX/train/a.png", "train/._a.png"])
def test_hidden_names(name: str) -> None:
    assert hidden(name)
    assert not hidden("train/a.b/c.png")
