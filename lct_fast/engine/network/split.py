"""Cutting a model into groups: trace, find where a single tensor crosses, balance."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, fx, nn

from lct_fast import critics as critic_registry
from lct_fast.critics import Critic
from lct_fast.engine.network.group import Cut, Group, build_module, make_groups

# A critic's spec, or a function of (the group's output shape without the batch, classes) that makes one.
CriticSpec = str | Callable[[tuple[int, ...], int], Critic]


def split(
    model: nn.Module,
    groups: int | None = None,
    example_input: Tensor | None = None,
    critic: CriticSpec | Sequence[CriticSpec] | None = None,
    split_points: Sequence[str] | None = None,
    repeats: int = 5,
) -> list[Group]:
    """Cut ``model`` into groups, each with a critic on its output.

    Without ``split_points`` the cuts are placed so that the slowest group, its critic included, is as fast as
    possible: forward and backward of every unit and every possible critic are timed on ``example_input``'s
    device, on a copy of the model. The model's parameters, buffers and the random state stay as they were.

    Args:
        model: an ``nn.Sequential`` (nested ones are opened) or any module whose ``forward`` torch.fx can trace;
            submodules other than ``nn.Sequential`` stay whole. It is shared with the groups, not copied.
        groups: number K of groups; may be left out with ``split_points``.
        example_input: [N, ...], a batch as in training; N >= 2 where there is batch norm.
        critic: a critic's spec (see ``lct_fast.critics``) or a function ``(shape, num_classes) -> Critic``, for
            every cut, or a list of K - 1 of them; None for ``pooled_linear`` on feature maps, ``token_linear`` on
            tokens and ``linear`` on vectors.
        split_points: names of the K - 1 modules that start groups 2..K, e.g. ``["layer2", "layer3.4"]``.
        repeats: timings of each unit; the median counts.

    Raises:
        ValueError: a model that cannot be traced, more groups than places to cut, a name that is not such a
            place, parameters tied across a cut, or a critic that does not fit.
    """
    if example_input is None:
        raise ValueError(
            "split needs example_input, a batch shaped like those of training: split(model, 4, x)"
        )
    if isinstance(split_points, str):
        raise ValueError(f"split_points: expected a list of names, such as [{split_points!r}], got a string")
    if split_points is not None:
        if groups is not None and groups != len(split_points) + 1:
            raise ValueError(
                f"groups={groups} disagrees with {len(split_points)} split points: expected {groups - 1} names"
            )
        groups = len(split_points) + 1
    if type(groups) is not int or groups < 1:
        raise ValueError(f"groups: expected an integer >= 1, got {groups}")
    graph, starts = _trace(model, groups)
    if groups > len(starts) + 1:
        raise ValueError(
            f"{groups} groups asked for, but the model has only {len(starts) + 1} units to cut between "
            f"({', '.join(str(n.target) for n in starts[:6])}, ...): use at most {len(starts) + 1} groups"
        )
    shapes, num_classes = _shapes(model, graph, example_input)
    specs = _critic_specs(critic, groups)
    if split_points is not None:
        chosen = _named(starts, split_points)
    else:
        chosen = _balance(model, graph, starts, groups, example_input, shapes, specs, num_classes, repeats)
    cut_shapes = [shapes[_before(graph, n)] for n in chosen]
    critics = [
        _head(spec, shape, num_classes, example_input.device)
        for spec, shape in zip(specs, cut_shapes, strict=True)
    ]
    (output,) = (n for n in graph.nodes if n.op == "output")
    cut = Cut(model, graph, chosen, num_classes, example_input, len(shapes[output]))
    result = make_groups(cut, critics, cut_shapes)
    _refuse_ties(result)
    return result


class _Tracer(fx.Tracer):
    """Keeps every submodule whole, except plain nn.Sequential, and with ``deep`` everything but torch's own."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.Sequential:
            return False
        return not self.deep or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, groups: int) -> tuple[fx.Graph, list[fx.Node]]:
    best: tuple[fx.Graph, list[fx.Node]] | None = None
    error: Exception | None = None
    for deep in (False, True):
        try:
            graph = _Tracer(deep).trace(model)
        except Exception as e:
            error = e
            continue
        starts = _starts(model, graph)
        if best is None or len(starts) > len(best[1]):
            best = graph, starts
        if len(starts) + 1 >= groups:
            break
    if best is None:
        raise ValueError(
            f"cannot trace {type(model).__name__}.forward ({error}): write the model as nn.Sequential, or move the "
            f"data-dependent code into a submodule"
        )
    return best


def _starts(model: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Nodes before which a group may start: one tensor crosses, and the node is a module with a weight matrix."""
    nodes = list(graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    last_use = {n: max((position[u] for u in n.users), default=-1) for n in nodes}
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"expected a model of one input tensor, got {len(inputs)} inputs")
    starts = []
    weights_before = False
    for i, node in enumerate(nodes):
        heavy = node.op == "call_module" and _has_matrix(model.get_submodule(str(node.target)))
        crossing = [n for n in nodes[:i] if last_use[n] >= i and n.op != "get_attr"]
        if heavy and weights_before and len(crossing) == 1 and crossing[0].op != "placeholder":
            starts.append(node)
        weights_before |= heavy
    return starts


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())


def _before(graph: fx.Graph, start: fx.Node) -> fx.Node:
    """The node whose value crosses the cut in front of ``start``."""
    nodes = list(graph.nodes)
    i = nodes.index(start)
    return next(
        n for n in reversed(nodes[:i]) if n.op != "get_attr" and any(nodes.index(u) >= i for u in n.users)
    )


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape[1:])
        return value


def _shapes(model: nn.Module, graph: fx.Graph, x: Tensor) -> tuple[dict[fx.Node, tuple[int, ...]], int]:
    training = model.training
    recorder = _ShapeRecorder(model.eval(), graph)
    try:
        with torch.no_grad():
            out = recorder.run(x)
    except RuntimeError as e:
        first = str(e).splitlines()[0]
        raise ValueError(
            f"the model does not accept an input of shape {tuple(x.shape)}: {first}; check channels and image size"
        ) from None
    finally:
        model.train(training)
    if not isinstance(out, Tensor) or out.dim() < 2:
        raise ValueError(
            f"the model must return logits [N, classes], got {getattr(out, 'shape', type(out).__name__)}"
        )
    return recorder.shapes, out.shape[-1]


def _critic_specs(critic: CriticSpec | Sequence[CriticSpec] | None, groups: int) -> list[CriticSpec | None]:
    one = critic is None or isinstance(critic, str) or callable(critic)
    specs: list[CriticSpec | None] = [critic] if one else list(critic)  # type: ignore[arg-type,list-item]
    if len(specs) == 1:
        specs *= groups - 1
    if len(specs) != groups - 1 and groups > 1:
        raise ValueError(f"critic: expected one spec or one for each of {groups - 1} cuts, got {len(specs)}")
    return specs[: groups - 1]


def _named(starts: list[fx.Node], names: Sequence[str]) -> list[fx.Node]:
    chosen = []
    for name in names:
        hits = [n for n in starts if str(n.target) == name or str(n.target).startswith(f"{name}.")]
        if not hits:
            raise ValueError(
                f"split point {name!r} is not a place to cut: choose from {', '.join(str(n.target) for n in starts)}"
            )
        chosen.append(hits[0])
    order = [starts.index(n) for n in chosen]
    if order != sorted(set(order)):
        raise ValueError(f"split points must be in the model's order, each once: got {', '.join(names)}")
    return chosen


def _balance(
    model: nn.Module,
    graph: fx.Graph,
    starts: list[fx.Node],
    groups: int,
    x: Tensor,
    shapes: dict[fx.Node, tuple[int, ...]],
    specs: list[CriticSpec | None],
    num_classes: int,
    repeats: int,
) -> list[fx.Node]:
    """The cuts that make the slowest group fastest."""
    if groups == 1:
        return []
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        twin = copy.deepcopy(model).train()
        cost = []
        at_cut: list[Tensor] = []
        for nodes in Cut(twin, graph, starts, num_classes, x).groups():
            x = x.detach()
            seconds, x = _time(build_module(twin, nodes), x, repeats)
            cost.append(seconds)
            at_cut.append(x)
        critic_cost = {
            (spec, i): _time(
                _head(spec, shapes[_before(graph, node)], num_classes, x.device), at_cut[i], repeats
            )[0]
            for spec in set(specs)
            for i, node in enumerate(starts)
            if _fits(spec, shapes[_before(graph, node)], num_classes)
        }
    for spec in specs:
        if not any(fitting == spec for fitting, _ in critic_cost):
            # Says why it fits nowhere: an unknown name, say.
            _head(spec, shapes[_before(graph, starts[-1])], num_classes, torch.device("meta"))
    ends = _partition(cost, groups, lambda k, i: critic_cost.get((specs[k], i), float("inf")))
    return [starts[i] for i in ends]


def _head(spec: CriticSpec | None, shape: tuple[int, ...], num_classes: int, device: torch.device) -> Critic:
    if spec is None:
        spec = {3: "pooled_linear", 2: "token_linear"}.get(len(shape), "linear")
    if callable(spec):
        return spec(shape, num_classes).to(device)
    return critic_registry.build(spec, shape, num_classes).to(device)


def _fits(spec: CriticSpec | None, shape: tuple[int, ...], num_classes: int) -> bool:
    try:
        _head(spec, shape, num_classes, torch.device("meta"))
    except ValueError:
        return False
    return True


def _partition(cost: list[float], groups: int, critic_cost: Callable[[int, int], float]) -> list[int]:
    """Indices i of the units after which to cut, minimising the largest group + critic; exact, by dynamic programming.

    ``critic_cost(k, i)`` is the cost of critic k (from 0) on the output of unit i.
    """
    n = len(cost)
    total = [0.0]
    for c in cost:
        total.append(total[-1] + c)
    # best[j] = (largest group, cuts) for the first j units in the groups placed so far.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for k in range(groups):
        last = k == groups - 1
        placed: dict[int, tuple[float, list[int]]] = {}
        for j in [n] if last else range(k + 1, n - (groups - k - 1) + 1):
            head = 0.0 if last else critic_cost(k, j - 1)
            for i, (worst, cuts) in best.items():
                if i < j:
                    slowest = max(worst, total[j] - total[i] + head)
                    if j not in placed or slowest < placed[j][0]:
                        placed[j] = slowest, cuts if last else [*cuts, j - 1]
        best = placed
    slowest, cuts = best[n]
    if slowest == float("inf"):
        raise ValueError(
            f"no split into {groups} groups lets this critic stand on every cut: choose another critic"
        )
    return cuts


def _time(module: nn.Module, x: Tensor, repeats: int) -> tuple[float, Tensor]:
    """Median seconds of forward and backward, and the output."""
    samples = []
    needs_grad = x.is_floating_point()
    for r in range(repeats + 1):
        x = x.detach().requires_grad_(needs_grad)
        _wait(x.device)
        start = time.perf_counter()
        y = module(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        _wait(x.device)
        if r:
            samples.append(time.perf_counter() - start)
    return median(samples), y.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refuse_ties(groups: list[Group]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for k, group in enumerate(groups, 1):
        for kind in (group.named_parameters(), group.named_buffers()):
            for name, tensor in kind:
                first, other = owner.setdefault(id(tensor), (k, name))
                if first != k:
                    raise ValueError(
                        f"{other.removeprefix('layers.')!r} of group {first} is tied to "
                        f"{name.removeprefix('layers.')!r} of group {k}: no gradient crosses a cut, "
                        f"so tied weights must lie in one group; move the cut"
                    )
