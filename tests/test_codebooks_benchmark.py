"""The benchmark of codebooks, tiny, on images made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import codebooks
from benchmarks.codebooks import DECAYS, Watched, main
from benchmarks.tables import codebooks as tables
from benchmarks.tables.results import Results
from lct_fast import codecs


def test_the_error_is_what_the_consumer_sees() -> None:
    draw = torch.Generator().manual_seed(0)
    watched, plain = Watched("vq:16,4,2", 0.9), codecs.build("vq:16,4,2")
    assert watched.decay(10**6) == 0.9 and Watched("vq:16,4,2", None).decay(10**6) == 0.5
    for _ in range(2):
        h = torch.randn(32, 4, 4, 4, generator=draw)
        decoded = plain.decode(plain.encode(h))
        watched.encode(h)
        variance = h.var((0, 2, 3), correction=0).sum() * h.numel() / 4
        if len(watched.errors) == 1:
            expected = (decoded - h).square().sum() / variance
            assert watched.errors[0] == pytest.approx(float(expected), rel=1e-4)
    watched.encode(h, learn=False)
    assert len(watched.errors) == 2


def test_a_tiny_run_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 3, 32, 32), generator=draw, dtype=torch.uint8)
    data = SimpleNamespace(
        train_images=images, train_labels=torch.arange(256) % 10, mean=[0.5] * 3, std=[0.25] * 3
    )
    asked: list[tuple[str, int]] = []

    def load(spec: str, *, limit: int) -> SimpleNamespace:
        asked.append((spec, limit))
        return data

    monkeypatch.setattr(codebooks.lct.data, "load", load)
    out = tmp_path / "new" / "codebooks.json"
    assert main(["--data", "somewhere", "--images", "256", "--epochs", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert asked == [("cifar10:somewhere", 256)]
    assert [run["decay"] for run in report["runs"]] == list(DECAYS)
    for run in report["runs"]:
        assert [len(cut["error_of_epoch"]) for cut in run["cuts"]] == [2, 2, 2]
        assert all(0 < e < 1 for cut in run["cuts"] for e in cut["error_of_epoch"])
        assert all(cut["codebooks"] >= 1 and 0 < cut["codebook_share"] < 1 for cut in run["cuts"])
    # All begin alike; only the decay differs, and only once averages are longer than the run so far.
    first = [run["cuts"][0]["error_of_epoch"][0] for run in report["runs"]]
    assert first == pytest.approx([first[0]] * len(first), rel=0.2)
    table = tables.errors(Results(out.parent))
    assert table.count("\n") == 1 + len(DECAYS) and "| the rule |" in table and "| 0.99 |" in table
    for bad in (["--epochs", "0"], ["--images", "100"]):
        with pytest.raises(SystemExit):
            main(["--data", "somewhere", *bad, "--out", str(out)])
