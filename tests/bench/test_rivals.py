"""Other packages: named where they are missing, asked for the same job where they are there.

Those that need a device are stood in for by functions of the same signature, which shows that what goes in and what
comes out is understood: flash-kmeans 0.2's `batch_kmeans_Euclid`, liger-kernel's `LigerFusedLinearCrossEntropyLoss`,
quack-kernels' `linear_cross_entropy_func`.
"""

import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lct_fast.bench import cases, rivals
from lct_fast.bench.case import Contender, Place
from lct_fast.bench.cases import critic_head, vq
from lct_fast.bench.rule import WrongOutput, against

ROOT = Path(__file__).parents[2]


def test_missing_rivals_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda module: module == "faiss")
    assert rivals.missing(["quack", "faiss", "vector_quantize_pytorch"]) == [
        "quack-kernels is not installed; pip install 'lct-fast[rivals-gpu]'",
        "vector-quantize-pytorch is not installed; pip install 'lct-fast[rivals]'",
    ]


def test_every_rival_of_a_benchmark_is_a_known_package() -> None:
    named = {m for bench in cases.find([]) for modules in bench.rivals.values() for m in modules}
    assert named == set(rivals.PACKAGES)


def test_an_extra_installs_every_rival() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in rivals.PACKAGES.values():
        assert package in extras[extra]


@pytest.mark.parametrize(
    ("module", "name"),
    [("faiss", "faiss, search alone"), ("vector_quantize_pytorch", "vector-quantize-pytorch, train step")],
)
# faiss's wrappers and the other package's dependencies warn of their own futures.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_installed_rivals_find_the_nearest_words(module: str, name: str) -> None:
    pytest.importorskip(module)
    shape = "700,1,4,16,f32,skewed"
    (bench,) = cases.find(["vq_encode"])
    case = bench.case(shape, Place(rivals=True))
    (rival,) = (each for each in case.contenders if each.name == name)
    for _ in range(2):
        # The second time as the first: what training moved is brought back.
        if rival.reset:
            rival.reset()
        outputs = dict(rival.outputs(rival.run()))
        assert case.check(outputs, rival.slack).of_rule <= 1
    outputs["codes"] = outputs["codes"].flip(0)
    with pytest.raises(WrongOutput, match="farther than the nearest"):
        case.check(outputs, rival.slack)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name.partition(".")[0], module)
    monkeypatch.setitem(sys.modules, name, module)
    wanted = name.partition(".")[0]
    for file in (vq, critic_head):
        monkeypatch.setattr(file, "installed", lambda module: module == wanted)


def test_flash_kmeans_is_asked_for_one_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_kmeans_Euclid(
        x: Tensor,
        n_clusters: int,
        max_iters: int = 100,
        tol: float = 0.0,
        init_centroids: Tensor | None = None,
        verbose: bool = False,
    ) -> tuple[Tensor, Tensor, int]:
        assert init_centroids is not None and init_centroids.dtype == x.dtype
        assert max_iters == 1 and init_centroids.shape == (len(x), n_clusters, x.shape[2])
        ids = torch.cdist(x.float(), init_centroids.float()).argmin(2)
        chosen = torch.nn.functional.one_hot(ids, n_clusters).float()
        means = (chosen.mT @ x.float()) / chosen.sum(1)[:, :, None].clamp(min=1)
        kept = torch.where(chosen.sum(1)[:, :, None] > 0, means, init_centroids.float())
        return ids.int(), kept.to(x.dtype), 1

    stand_in(monkeypatch, "flash_kmeans", batch_kmeans_Euclid=batch_kmeans_Euclid)
    inputs = vq.Inputs(Place(), 300, 2, 4, 16, "bf16", "uniform")
    (rival,) = vq._rivals(Place("cuda", rivals=True), inputs)
    out = rival.run()
    assert vq.EncodeCheck(inputs)(rival.outputs(out), rival.slack).of_rule <= 1
    assert not rival.graphs
    with pytest.raises(WrongOutput, match="means"):
        vq.EncodeCheck(inputs)(rival.outputs((out[0], out[1].flip(1), 1)), rival.slack)
    full = vq.Inputs(Place(), 300, 2, 4, 16, "f32", "uniform")
    assert not list(vq._rivals(Place("cuda", rivals=True), full))


def head_rival() -> tuple[Contender, critic_head.Inputs]:
    inputs = critic_head.Inputs(Place(), 32, 8, 10, "f32")
    leaves = [x.clone().requires_grad_() for x in (inputs.h, inputs.weight, inputs.bias)]

    def step(loss_of: Any) -> Any:
        def run() -> tuple[Tensor, ...]:
            loss = loss_of(*leaves, inputs.target)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return run

    (rival,) = critic_head._rivals(Place("cuda", rivals=True), step)
    return rival, inputs


def test_liger_s_loss_takes_the_weight_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loss:
        def __call__(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor) -> Tensor:
            return cross_entropy(linear(_input, lin_weight, bias), target)

    stand_in(monkeypatch, "liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=Loss)
    rival, inputs = head_rival()
    assert against(inputs.expected())(rival.outputs(rival.run()), rival.slack).of_rule <= 1
    assert not rival.graphs


def test_quack_s_loss_takes_the_input_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear_cross_entropy_func(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight, bias), target)

    stand_in(monkeypatch, "quack.linear_cross_entropy", linear_cross_entropy_func=linear_cross_entropy_func)
    rival, inputs = head_rival()
    assert against(inputs.expected())(rival.outputs(rival.run()), rival.slack).of_rule <= 1


def test_without_rivals_none_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("faiss", "vector_quantize_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    (bench,) = cases.find(["vq_encode"])
    names = {each.name for each in bench.case(bench.tiny, Place()).contenders}
    assert names == {"lct_fast", "torch eager", "torch.compile", "torch.compile max-autotune-no-cudagraphs"}
