"""The same network on torch alone (LCT_BACKEND=reference) and on the kernels: the same losses, within rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast import ops
from tests.engine import nets
from tests.ladder import PLACES

# The method, its critic, the trainer's options, and the largest relative difference of a loss over eight updates.
# fp32 sums in another order differ by about 1e-7, which SGD at 0.05 carries on; a bf16 step is rounded at 2^-9. vq
# draws the first words by a race that reads the last bits of errors: another codebook on each backend, as good.
CASES: dict[str, tuple[type[lct.Method], str, dict[str, Any], float]] = {
    "pooled critics": (lct.LocalCritic, "pooled_linear", {}, 1e-4),
    "conv critics": (lct.LocalCritic, "conv_fc:filters=4", {"feedback_delay": 2}, 1e-4),
    "greedy, channels last": (lct.Greedy, "mlp_aux", {"channels_last": True}, 1e-3),
    "int4": (lct.Greedy, "pooled_linear", {"codec": "int4"}, 1e-2),
    "fp8": (lct.Greedy, "pooled_linear", {"codec": "fp8"}, 1e-2),
    "vq": (lct.LocalCritic, "pooled_linear", {"codec": "vq:16,2"}, 0.25),
    "bf16": (lct.LocalCritic, "pooled_linear", {"autocast": torch.bfloat16}, 3e-2),
}
KERNELS = sorted({place.backend for place in PLACES if place.device == "cpu"} - {"reference", "triton"})


def _losses(name: str, backend: str) -> Tensor:
    method, critic, options, _ = CASES[name]
    torch.manual_seed(0)
    groups = nets.groups(method(), critic=critic)
    with ops.use_backend(backend):
        trainer = lct.Trainer(
            groups, method(), optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), **options
        )
        return torch.stack([trainer.step(x, y).losses for x, y in nets.batches(8, rows=32)])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_reference(name: str, backend: str, threads: None) -> None:
    expected, got = _losses(name, "reference"), _losses(name, backend)
    torch.testing.assert_close(got, expected, rtol=CASES[name][3], atol=0.0)
    assert not torch.equal(expected[0], expected[-1]), "nothing was learned"


def test_the_two_are_not_the_same_code() -> None:
    """Bits differ: the kernels sum in another order."""
    assert not torch.equal(_losses("pooled critics", "reference"), _losses("pooled critics", KERNELS[0]))


@pytest.mark.slow
def test_the_variable_switches_the_command_line_to_torch_alone(tmp_path: Path) -> None:
    """With LCT_BACKEND=reference no kernel of the native module is called: the program replaces it by a trap."""
    trap = (
        "import lct_fast._native as n, sys; n.load = lambda: sys.exit('the native module was asked for');"
        "from lct_fast.cli import main; sys.exit(main())"
    )
    accuracies = []
    for backend in ("reference", ""):
        run = tmp_path / (backend or "kernels")
        options = ["--data", "digits", "--groups", "2", "--epochs", "3", "--codec", "vq:16,2", "--seed", "1"]
        start = ["-c", trap] if backend else ["-m", "lct_fast"]
        done = subprocess.run(
            [sys.executable, *start, "train", *options, "--out", str(run)],
            env=os.environ | {"LCT_BACKEND": backend, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        accuracies.append(json.loads((run / "summary.json").read_text())["test_accuracy"])
    # Of 360 images, three either way.
    assert accuracies[0] == pytest.approx(accuracies[1], abs=3.5 / 360) and accuracies[0] > 0.8
