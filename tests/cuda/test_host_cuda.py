"""host_cuda.h notices what it is there for."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda.host_build import HERE, build, run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("host"), HERE / "host_cuda_check.cpp")


def test_threads_and_warps(program: Path) -> None:
    first, second = sum(range(64)), sum(range(64, 128))
    assert run(program, "sum").stdout.splitlines() == [f"{first} {second}"] * 5
    assert run(program, "warp").stdout.split() == [str(sum(range(32))), str(sum(range(32, 64)))]


def test_votes_and_atomics(program: Path) -> None:
    peers = sum(1 << lane for lane in range(1, 32, 3))
    largest = max(thread * 7 % 50 for thread in range(64))
    found = [int(x) for x in run(program, "votes").stdout.split()]
    assert found == [0b11111, peers, 2 + 5 * 16 + 4 * 256, largest, 50 - largest]


def test_missing_barrier_gives_varying_results(program: Path) -> None:
    assert len(set(run(program, "race").stdout.splitlines())) > 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("past_the_end", "heap-buffer-overflow"),
        ("misses_barrier", "not every thread reaches"),
        ("splits_warp", "at another operation"),
    ],
)
def test_stops(program: Path, kernel: str, message: str) -> None:
    done = run(program, kernel)
    assert done.returncode != 0 and message in done.stderr


def test_refuses_shared_memory_that_no_device_has(program: Path) -> None:
    assert run(program, "too_much_shared").stdout.split() == ["error", "1"]


def test_conversions_are_torchs(program: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(2000, generator=draw) * 10.0 ** torch.randint(-9, 6, (2000,), generator=draw)
    # Ties between neighbours, ends of each range, halves of the smallest.
    ties = (1 + torch.arange(0, 64) / 2048).float()
    ends = torch.tensor([0.0, -0.0, 65504, 65519.996, 65520, 2**-24, 2**-25, 2**-14, 6.1e-5, 3e38, torch.inf])
    numbers = torch.cat([numbers, ties, ties / 65536, ends, -ends])
    text = "\n".join(f"{x:.9g}" for x in numbers.tolist())
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(
        [str(program), "convert"], input=text, capture_output=True, text=True, env=environment, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(numbers)
    for column, dtype in ((0, torch.float16), (2, torch.bfloat16)):
        expected = numbers.to(dtype)
        bits = torch.tensor([int(row[column]) for row in rows])
        assert torch.equal(bits, expected.view(torch.int16).long() & 0xFFFF)
        assert torch.equal(torch.tensor([float(row[column + 1]) for row in rows]), expected.float())
