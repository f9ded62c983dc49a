"""Every op, ours and plain torch, over the shapes of `lct_fast.bench`. For pytest-benchmark:

    python -m pytest benchmarks/bench_ops.py --benchmark-group-by=param:case [--tiny]

Not collected by the default test command. Each result is checked before it is timed. On a device each call is
synchronised, so launches count; `lct-fast bench --device cuda` measures with graphs.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from lct_fast.bench import cases
from lct_fast.bench.case import KERNELS, OURS, Case, Place

ROUNDS = 15
PLACE = Place("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS = (*(f"{OURS} {backend}" for backend in KERNELS[PLACE.device]), "torch eager", "torch.compile")


@lru_cache(1)
def case_of(name: str, shape: str) -> Case:
    torch.compiler.reset()
    try:
        return cases.find([name])[0].case(shape, PLACE)
    except ValueError as error:
        pytest.skip(str(error))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tiny = metafunc.config.getoption("--tiny")
    found = [
        (bench.name, shape)
        for bench in cases.find([])
        for shape in ((bench.tiny,) if tiny else bench.shapes[PLACE.device])
    ]
    metafunc.parametrize("case", found, ids=" ".join)
    metafunc.parametrize("contender", CONTENDERS)


def test_op(benchmark: Any, case: tuple[str, str], contender: str) -> None:
    built = case_of(*case)
    # Of the compiler's settings, the tuned one where there is only that.
    chosen = [each for each in built.contenders if each.label.startswith(contender)]
    if not chosen:
        pytest.skip(f"{contender} does not run here")

    def prepare() -> None:
        if chosen[0].reset:
            chosen[0].reset()

    def run() -> Any:
        out = chosen[0].run()
        if PLACE.device == "cuda":
            torch.cuda.synchronize()
        return out

    prepare()
    built.check(chosen[0].outputs(run()), chosen[0].slack)
    benchmark.pedantic(run, setup=prepare, rounds=ROUNDS)
