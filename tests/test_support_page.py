"""docs/support.md: its tables are what the registries, the ops and the option checks say."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lct_fast as lct
from lct_fast import ops
from lct_fast.cli.build_method import build_method
from lct_fast.cli.config import resolve
from lct_fast.cli.options import METHODS
from lct_fast.ops.backend import _OPS, NAMES
from tests.ladder import PLACES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/support.md").read_text()
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
# Registered under a name of its own: the gradient of an op.
BACKWARD = {"bn_relu_pool_backward": "bn_relu_pool", "group_linear_backward": "group_linear"}


def _table(first: str) -> dict[str, dict[str, str]]:
    """The table whose first heading is ``first``: of each row's first cell, the others by their headings."""
    head, rest = re.split(rf"^\| *{first} *\|", PAGE, maxsplit=1, flags=re.M)[1].split("\n|---", 1)
    columns = [c.strip() for c in head.strip().strip("|").split("|")]
    rows = [line.strip("|").split("|") for line in rest.split("\n\n")[0].splitlines()[1:]]
    return {
        row[0].strip().strip("`"): dict(zip(columns, (c.strip() for c in row[1:]), strict=True))
        for row in rows
    }


def _bn_relu_pool(x: Tensor) -> None:
    maps = x.view(4, 2, 4, 4).requires_grad_()
    out = ops.bn_relu_pool(maps, torch.ones(2), torch.zeros(2), pool=2)
    (out.y.sum() + out.pooled.sum()).backward()


def _group_linear(x: Tensor) -> None:
    weight = x[:3].detach().clone()
    h, _ = ops.group_linear(x.requires_grad_(), weight, None, "relu")
    h.sum().backward()


def _critic_head(x: Tensor) -> None:
    ops.critic_head(x, x[:3].clone(), None, torch.zeros(4, dtype=torch.int64), torch.ones(()))


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _consensus_update(x: Tensor) -> None:
    ops.consensus_update(torch.zeros(4, 32), None, x, x, 0.1, 1.0)


# x is [4, 32] of the dtype in question.
CALLS: dict[str, Callable[[Tensor], object]] = {
    "critic_head": _critic_head,
    "critic_head_wgrad": lambda x: ops.critic_head_wgrad(
        x, x[:, :3].contiguous(), torch.ones(4, dtype=_sums(x))
    ),
    "bn_relu_pool": _bn_relu_pool,
    "group_linear": _group_linear,
    "vq_encode": lambda x: ops.vq_encode(x, torch.eye(4, 32, dtype=_sums(x))[None]),
    # Of decoding the words count, and what comes out.
    "vq_decode": lambda x: ops.vq_decode(
        torch.zeros(1, dtype=torch.uint8), torch.eye(4, 32, dtype=_sums(x))[None], 4, x.dtype
    ),
    "vq_update": lambda x: ops.vq_update(
        x[None].clone(), ops.vq_state(x[None]), torch.ones(1, 4, dtype=torch.int64), x[None], x[None, :1]
    ),
    "block_quantize": ops.block_quantize,
    "block_dequantize": lambda x: ops.block_dequantize(
        torch.zeros(128, dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16), 128, dtype=x.dtype
    ),
    "consensus_adjoint": lambda x: ops.consensus_adjoint(x, torch.zeros(4, 32), None, 0.1),
    "consensus_update": _consensus_update,
    "perturb": lambda x: ops.perturb(x, torch.ones(()), 0),
    "score": lambda x: ops.score(torch.ones(4), torch.ones(()), 0, 0, (4, 32), dtype=x.dtype),
}


def _takes(op: str, backend: str, dtype: torch.dtype) -> bool:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with ops.use_backend(backend):
            CALLS[op](x)
    except (TypeError, ops.BackendError):
        return False
    return True


def _cell(op: str, backend: str) -> str:
    return " ".join(name for name, dtype in DTYPES.items() if _takes(op, backend, dtype))


def test_every_op_has_a_row() -> None:
    assert {BACKWARD.get(name, name) for name in _OPS} == set(_table("op")) == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_dtypes_are_those_that_ops_take(op: str) -> None:
    row, backends = _table("op")[op], _OPS[op].backends
    here = {place.backend for place in PLACES if place.device == "cpu"}
    for backend in NAMES:
        if backend not in backends:
            assert row[backend] == "", backend
        elif backend in here:
            assert row[backend] == _cell(op, backend), backend
        else:
            # It needs a device: its entry in the registry has to be that of `cpu`, and so the cell.
            assert backends[backend].dtypes == backends["cpu"].dtypes, backend
            assert row[backend] == row["cpu"], backend


def test_limits_are_those_of_the_registry() -> None:
    text = " ".join(PAGE.split())
    assert f"up to {_OPS['critic_head'].backends['triton'].largest} classes" in text
    triton = _OPS["vq_encode"].backends["triton"]
    assert triton.depths is not None and triton.best is not None
    assert f"up to {triton.largest} words of {triton.depths[0]} to {triton.depths[-1]} columns" in text
    assert f"{triton.best[0]} columns on it is preferred" in text
    for op in _OPS.values():
        assert list(op.preference["cpu"]) == ["cpu"]
        assert op.preference["cuda"][0] == ("triton" if "triton" in op.backends else "cuda")


# Of each column the command line's options, and Trainer's where one process can try them.
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "lockstep": ({}, {}),
    "pipelined": ({"schedule": "pipelined"}, {"schedule": "pipelined"}),
    "async": ({"schedule": "async"}, {"schedule": lct.Async(steps=2)}),
    "`--serial`": ({"serial": 0.1}, {"schedule": lct.Hybrid(0.1)}),
    "pipelined, `--serial`": (
        {"schedule": "pipelined", "serial": 0.1},
        {"schedule": lct.Hybrid(0.1, "pipelined")},
    ),
    "`--replicas`": ({"schedule": "pipelined", "replicas": 2}, None),
    "`--codec`": ({"codec": ["int8"]}, {"codec": "int8"}),
    "`--codec auto`": ({"codec": ["auto"]}, {"codec": "auto"}),
    "texts": ({"data": "text:FILE"}, None),
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("local-critic", {"schedule": "pipelined", "feedback_delay": 0}),
    ("local-critic", {"schedule": "pipelined", "critic_target": "last"}),
    ("greedy", {"replicas": 2}),
    ("greedy", {"replicas": 2, "schedule": "pipelined", "serial": 0.1}),
]


def _refusal(method: str, options: dict[str, Any], arguments: dict[str, Any] | None = None) -> str:
    """In which words this is refused; empty if it is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = lct.split(model, example_input=torch.randn(4, 8), split_points=["2"])
    try:
        config = resolve({"data": "digits", "method": method} | options)
        if arguments is not None:
            lct.Trainer(groups, build_method(config), samples=8, **arguments)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", METHODS)
def test_methods_go_with_what_the_table_says(method: str, threads: None) -> None:
    row = _table("method")[method]
    assert set(row) == set(COLUMNS)
    assert row == {
        column: "refused" if _refusal(method, *given) else "yes" for column, given in COLUMNS.items()
    }


def test_all_methods_have_a_row() -> None:
    assert tuple(_table("method")) == METHODS


def test_what_is_refused_says_why() -> None:
    said = [_refusal(method, *given) for method in METHODS for given in COLUMNS.values()]
    said += [_refusal(method, options) for method, options in OTHERS]
    for what, row in _table("refused").items():
        words = row["in these words"]
        assert any(words in message for message in said), f"{what}: {words}"


def test_versions_are_those_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        re.match(r"[\w-]+", d)[0]: re.sub(r"^[\w-]+|;.*| ", "", d)  # type: ignore[index]
        for d in project["dependencies"]
    }
    rows = _table("")
    assert f"`{project['requires-python']}`" in rows["Python"]["declared"]
    for name in ("torch", "triton"):
        assert f"`{needed[name]}`" in rows[name]["declared"], name
    targets = re.search(r'DEFAULT_ARCHS = "(.*)"', (ROOT / "setup.py").read_text())
    assert targets and f"`{targets[1]}`" in rows["GPU, CUDA kernels"]["declared"]
