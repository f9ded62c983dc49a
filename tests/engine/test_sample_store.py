"""What groups keep for samples: by name, coded or not, in memory or in files; and which samples a batch holds."""

import errno
import os
from pathlib import Path

import pytest
import torch

import lct_fast as lct
from lct_fast.engine.storage.sample_store import Samples, SampleStore

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


def store(codec: str = "none", file: Path | None = None, count: int = 10) -> SampleStore:
    return SampleStore(("lambda", "kappa"), count, SHAPE, codec, CPU, file)


def some(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(rows, *SHAPE, generator=draw) for n in ("lambda", "kappa")}


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4:32", "downsample:2", "downsample:2+int8:32"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_each_sample_gets_its_own_back(codec: str, on_disk: bool, tmp_path: Path) -> None:
    kept = store(codec, tmp_path / "lambda" / "group-1" if on_disk else None)
    first, second = torch.tensor([7, 0, 3]), torch.tensor([3, 9])
    one, two = some(3), some(2, seed=1)
    kept.write(first, one)
    kept.write(second, two)
    found = kept.read(torch.tensor([9, 1, 7, 3]))
    assert found.known.tolist() == [True, False, True, True]
    code = lct.codecs.build(codec)
    for name in ("lambda", "kappa"):
        whole = torch.stack([two[name][1], torch.zeros(SHAPE), one[name][0], two[name][0]])
        torch.testing.assert_close(found.tensors[name], code.decode(code.encode(whole)), rtol=0, atol=0)


def test_files_hold_what_is_kept(tmp_path: Path) -> None:
    kept = store(file=tmp_path / "group-2")
    values = some(1)
    kept.write(torch.tensor([4]), values)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["group-2-kappa-0.bin", "group-2-lambda-0.bin"]
    raw = torch.from_file(str(tmp_path / files[1]), size=10 * 256).view(10, *SHAPE)
    assert torch.equal(raw[4], values["lambda"][0]) and not raw[:4].any()
    assert kept.nbytes == sum((tmp_path / name).stat().st_size for name in files) == 2 * 10 * 256 * 4


def test_codes_take_less_room() -> None:
    assert store("int8").nbytes * 3 < store().nbytes
    assert store("downsample:2").nbytes * 4 == store().nbytes


def test_forgotten_samples_are_unknown_again() -> None:
    kept = store()
    kept.write(torch.tensor([1, 2]), some(2))
    kept.forget()
    found = kept.read(torch.tensor([1, 2]))
    assert kept.era == 1 and not found.known.any() and not found.tensors["lambda"].any()


def test_a_row_with_nan_leaves_its_sample_unknown() -> None:
    kept, values = store(), some(3)
    values["kappa"][1, 2, 3, 4] = float("nan")
    kept.write(torch.tensor([5, 6, 7]), values)
    found = kept.read(torch.tensor([5, 6, 7]))
    assert found.known.tolist() == [True, False, True]
    assert not found.tensors["kappa"][1].any()


def test_state_there_and_back() -> None:
    kept = store("int8")
    kept.forget()
    kept.write(torch.tensor([1, 8]), some(2))
    other = store("int8")
    other.load_state(kept.state())
    every = torch.arange(10)
    a, b = kept.read(every), other.read(every)
    assert (
        other.era == 1
        and torch.equal(a.known, b.known)
        and torch.equal(a.tensors["kappa"], b.tensors["kappa"])
    )
    # A copy, not the same memory.
    other.write(torch.tensor([1]), some(1, seed=3))
    assert not torch.equal(kept.read(every).tensors["lambda"], other.read(every).tensors["lambda"])
    with pytest.raises(ValueError, match="state of samples: expected"):
        store("none").load_state(kept.state())


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("vq:16,2", "learns as it codes: use one without a state"),
        ("int8:256", "does not code samples of shape"),
        ("nonsense", "unknown codec 'nonsense'"),
    ],
)
def test_codecs_that_do_not_fit(codec: str, message: str) -> None:
    shape = (4, 9, 9) if codec == "int8:256" else SHAPE
    with pytest.raises(ValueError, match=message):
        SampleStore(("lambda",), 5, shape, codec, CPU)


def test_no_room_on_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no room for 160 bytes of .*No space left.*make room"):
        SampleStore(("lambda",), 10, (4,), "none", CPU, tmp_path / "group-1")


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="expected a number >= 1"):
        store(count=0)


CHECKED = Samples(lct.LayerParallel(), 20)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, r"penalty keeps a state for each training sample: say which ones.*int64 \[3\]"),
        (torch.tensor([1, 2]), r"samples: expected int64 \[3\], got int64 \[2\]"),
        (torch.tensor([1.0, 2.0, 3.0]), r"got float32 \[3\]"),
        (torch.tensor([1, 2, 20]), "expected numbers 0..19, got 1..20"),
        (torch.tensor([1, -1, 2]), "expected numbers 0..19, got -1..2"),
        (torch.tensor([1, 2, 1]), "got one twice"),
    ],
)
def test_samples_that_do_not_fit(samples: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CHECKED.check(samples, torch.zeros(3, 2))


def test_samples_are_asked_for_only_where_something_is_kept() -> None:
    x = torch.zeros(3, 2)
    assert Samples(lct.Greedy(), None).check(None, x) is None
    assert CHECKED.check(torch.tensor([4, 0, 19]), x) is not None
    with pytest.raises(ValueError, match=r"say how many there are with Trainer\(..., samples=N\)"):
        Samples(lct.LayerParallel(), None).check(torch.tensor([1]), x[:1])
