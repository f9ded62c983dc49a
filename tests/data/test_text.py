"""A text as ids: what is read, how it is split, what is refused."""

from pathlib import Path

import pytest
import torch

from lct_fast.data import DataError, load, load_text, text_path


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "text.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def decode(ids: torch.Tensor, vocabulary: list[str]) -> str:
    return "".join(vocabulary[i] for i in ids.tolist())


def test_ids_are_places_among_the_sorted_characters_of_the_whole_file(tmp_path: Path) -> None:
    # Line ends stay, characters beyond 16 bits count as one, and the end holds some that training lacks.
    text = "ba\r\nüé\U0001f600" * 9 + "zq"
    found = load_text(write(tmp_path, text))
    assert found.vocabulary == sorted(set(text)) and found.classes == found.vocabulary
    assert len(found.test) == len(text) // 10 and found.train.dtype == torch.uint8
    assert decode(torch.cat([found.train, found.test]), found.vocabulary) == text
    assert set(decode(found.test, found.vocabulary)) - set(decode(found.train, found.vocabulary)) == {
        "z",
        "q",
    }
    assert found.name == "text.txt" and found.sources == (str(tmp_path / "text.txt"),)


def test_many_characters_take_wider_ids_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(300))
    found = load_text(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert found.train.dtype == torch.int32 and len(found.vocabulary) == 300
    assert decode(found.train, found.vocabulary) == text[:270]


def test_a_limit_shortens_training_only(tmp_path: Path) -> None:
    file = write(tmp_path, "abcdefghij" * 10)
    whole, part = load_text(file), load_text(file, limit=17)
    assert torch.equal(part.train, whole.train[:17]) and torch.equal(part.test, whole.test)
    assert part.vocabulary == whole.vocabulary
    assert len(load_text(file, limit=1000).train) == 90


def test_the_vocabulary_of_a_run_keeps_its_ids(tmp_path: Path) -> None:
    file = write(tmp_path, "bcd" * 20)
    found = load_text(file, vocabulary=["a", "b", "c", "d"])
    assert found.train[:3].tolist() == [1, 2, 3] and found.vocabulary == ["a", "b", "c", "d"]
    with pytest.raises(DataError, match=r"holds 1 characters that the run's vocabulary lacks \('d'\)"):
        load_text(file, vocabulary=["b", "c"])


@pytest.mark.parametrize(
    ("text", "limit", "words"),
    [
        (b"abc\xff" + b"x" * 40, None, r"expected UTF-8, got byte 0xff at 3 of .*convert"),
        ("too short", None, "expected 20 characters or more, got 9"),
        ("", None, "expected 20 characters or more, got 0"),
        ("x" * 40, 0, "limit: expected 1 or more training characters, got 0"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, text: str | bytes, limit: int | None, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_text(write(tmp_path, text), limit)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which does not exist; check the path"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot read"):
        load_text(tmp_path)


def test_specs() -> None:
    assert text_path("text:some/file") == Path("some/file") and text_path("digits") is None
    with pytest.raises(DataError, match="expected text:FILE, got 'text:'"):
        text_path("text:")
    with pytest.raises(DataError, match="a text is read by data.load_text"):
        load("text:some/file")
