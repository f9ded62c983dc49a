"""On a machine with a device every op is tested on the backends that it has, and on no other."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from lct_fast import ops

ROOT = Path(__file__).parents[2]
# Collects as if there were a device; nothing runs.
COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/ops"]))
"""


@pytest.mark.slow
def test_every_op_runs_on_the_backends_that_it_has() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    has = {name: set(ops.backends(name)) for name in ops.names()}
    found = defaultdict(set)
    for file, backend in re.findall(
        r"^tests/ops/test_(\w+)\.py::.*\b(reference|cpu|triton|cuda)-cuda\b", done.stdout, re.M
    ):
        for name in has:
            if file.startswith(name):
                found[name].add(backend)
    for name, backends in found.items():
        assert backends == has[name] - {"cpu"}, name
    assert {"bn_relu_pool", "group_linear", "critic_head", "vq_update"} <= found.keys()
