"""The lockstep loop: the papers' order of updates, and what users bring along."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from tests.engine import nets


def _sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)  # type: ignore[arg-type]


def _adam(params: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)  # type: ignore[arg-type]


def _train(trainer: lct.Trainer, batches: list[tuple[Tensor, Tensor]]) -> lct.Trainer:
    for x, y in batches:
        trainer.step(x, y)
    trainer.flush()
    return trainer


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_local_critic_is_the_papers_algorithm(delay: int) -> None:
    """Against a plain-autograd loop: groups from CE of their critic, critics from the L1 distance, d batches late."""
    batches = nets.batches(7)
    trainer = _train(
        lct.Trainer(
            nets.groups(lct.LocalCritic()),
            lct.LocalCritic(critic_optimizer=_adam),
            optimizer=_sgd,
            feedback_delay=delay,
        ),
        batches,
    )
    groups = nets.groups(lct.LocalCritic())
    main = [_sgd(g.parameters() if g.last else g.layers.parameters()) for g in groups]
    critic = [_adam(g.critic.parameters()) for g in groups[:-1]]
    owed: deque[list[Tensor]] = deque()
    for x, y in batches:
        h, own, gradients = x, [], []
        for k, g in enumerate(groups):
            out = g.layers(h)
            loss = F.cross_entropy(g.critic(out), y, reduction="none")
            own.append(loss.detach())
            main[k].zero_grad()
            for p in g.critic.parameters():
                p.grad = None
            loss.mean().backward()
            main[k].step()
            h = out.detach()
            if not g.last:
                # The critic's own per-sample loss, kept with the weights of now.
                per_sample = F.cross_entropy(g.critic(h), y, reduction="none")
                jacobian = [
                    torch.autograd.grad(one, list(g.critic.parameters()), retain_graph=True)
                    for one in per_sample
                ]
                gradients.append(jacobian)
        late = []
        for k in range(len(groups) - 1):
            sign = (own[k] - own[k + 1]).sign() / len(y)
            late.append(
                [
                    sum(s * j[i] for s, j in zip(sign, gradients[k], strict=True))
                    for i in range(len(gradients[k][0]))
                ]
            )
        owed.append(late)
        if len(owed) > delay:
            _apply(critic, groups, owed.popleft())
    if owed:
        # flush() applies what is left as one update.
        total = [
            [sum(parts) for parts in zip(*(late[k] for late in owed), strict=True)]
            for k in range(len(groups) - 1)
        ]
        _apply(critic, groups, total)
    for a, b in zip(trainer.groups, groups, strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            # fp32, seven updates, Adam's division by small second moments: measured difference under 1e-5.
            torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def _apply(
    optimizers: list[torch.optim.Optimizer], groups: list[lct.Group], gradients: list[list[Tensor]]
) -> None:
    for optimizer, group, late in zip(optimizers, groups, gradients, strict=False):
        for p, g in zip(group.critic.parameters(), late, strict=True):
            p.grad = g
        optimizer.step()


def test_feedback_delay_moves_critics_only() -> None:
    """Delay touches critics alone: before the first late update the groups are equal bit for bit."""
    batches = nets.batches(3)
    a = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd, feedback_delay=0)
    b = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd, feedback_delay=2)
    a.step(*batches[0]), b.step(*batches[0])
    layers = [{n: t for n, t in nets.state(t_).items() if "layers" in n} for t_ in (a, b)]
    critics = [
        {n: t for n, t in nets.state(t_).items() if "layers" not in n and not n.startswith("3")}
        for t_ in (a, b)
    ]
    assert nets.same(*layers)
    assert not nets.same(*critics)
    assert b.step(*batches[1]).in_flight == 2 and a.step(*batches[1]).in_flight == 0


def test_greedy_equals_separate_training_of_each_group() -> None:
    batches = nets.batches(5)
    trainer = _train(lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), optimizer=_sgd), batches)
    groups = nets.groups(lct.Greedy())
    optimizers = [_sgd(g.parameters()) for g in groups]
    for x, y in batches:
        h = x
        for g, optimizer in zip(groups, optimizers, strict=True):
            out = g.layers(h)
            optimizer.zero_grad()
            F.cross_entropy(g.critic(out), y).backward()
            optimizer.step()
            h = out.detach()
    for a, b in zip(trainer.groups, groups, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_backprop_equals_a_plain_training_loop() -> None:
    batches = nets.batches(5)
    trainer = _train(lct.Trainer(nets.groups(lct.Backprop()), lct.Backprop(), optimizer=_sgd), batches)
    model = nets.net()
    optimizer = _sgd(model.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert trainer.module().state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.module().state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy, lct.Backprop])
def test_accumulation_equals_one_larger_batch(method: type[lct.Method]) -> None:
    """Without batch norm (evaluation statistics), four quarters give the update of the whole."""
    ((x, y),) = nets.batches(1, rows=32)
    states = []
    for accumulate in (1, 4):
        groups = nets.groups(method())
        for g in groups:
            for m in g.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum, m.track_running_stats = 0.0, False
                    m.forward = lambda x, m=m: x * m.weight.view(1, -1, 1, 1)  # type: ignore[method-assign,misc]
        trainer = lct.Trainer(groups, method(), optimizer=_sgd, accumulate=accumulate)
        for part in range(accumulate):
            rows = slice(part * 32 // accumulate, (part + 1) * 32 // accumulate)
            trainer.step(x[rows], y[rows])
        states.append(nets.state(trainer))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)
    assert not nets.same(states[0], nets.state(lct.Trainer(nets.groups(method()), method()))), (
        "nothing was updated"
    )


def test_critics_update_on_every_nth_update() -> None:
    trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(critic_every=3))
    moved = []
    for x, y in nets.batches(6):
        before = trainer.groups[0].critic.head.weight.clone()
        trainer.step(x, y)
        moved.append(not torch.equal(before, trainer.groups[0].critic.head.weight))
    assert moved == [True, False, False, True, False, False]


def test_each_group_is_clipped_on_its_own() -> None:
    trainer = lct.Trainer(
        nets.groups(lct.Greedy()), lct.Greedy(), optimizer=lambda p: torch.optim.SGD(p, 1.0), clip_norm=1e-3
    )
    before = nets.state(trainer)
    trainer.step(*nets.batches(1)[0])
    after = nets.state(trainer)
    for k in range(4):
        names = [n for n, _ in trainer.groups[k].named_parameters()]
        moved = torch.sqrt(sum((after[f"{k}.{n}"] - before[f"{k}.{n}"]).square().sum() for n in names))
        assert moved.item() == pytest.approx(1e-3, rel=2e-2)


def test_schedulers_tick_once_an_update_in_every_group() -> None:
    trainer = lct.Trainer(
        nets.groups(lct.LocalCritic()),
        lct.LocalCritic(),
        accumulate=2,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    )
    rates = []
    for x, y in nets.batches(8):
        trainer.step(x, y)
        rates.append([w.optimizer.param_groups[0]["lr"] for w in trainer.workers])
    assert rates == [[r] * 4 for r in (0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025)]


def test_ignored_labels_soft_labels_and_a_loss_of_ones_own() -> None:
    x, y = nets.batches(1)[0]
    y[::3] = 7
    ignoring = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), ignore_index=7)
    keep = y != 7
    expected = F.cross_entropy(
        nets.groups(lct.Greedy())[0].critic(nets.groups(lct.Greedy())[0].layers(x))[keep], y[keep]
    )
    assert ignoring.step(x, y).losses[0].item() == pytest.approx(expected.item(), rel=1e-5)

    _, y = nets.batches(1)[0]
    hard = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic())
    soft = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic())
    own = lct.Trainer(
        nets.groups(lct.LocalCritic()),
        lct.LocalCritic(),
        loss=lambda z, t: F.cross_entropy(z, t, reduction="none"),
    )
    hard.step(x, y), soft.step(x, F.one_hot(y, 5).float()), own.step(x, y)
    for other in (soft, own):
        for name, value in nets.state(hard).items():
            torch.testing.assert_close(value, nets.state(other)[name], rtol=1e-3, atol=1e-4)


def test_bf16_autocast_trains_near_fp32() -> None:
    batches = nets.batches(1) * 30
    losses = []
    for autocast in (None, torch.bfloat16):
        trainer = lct.Trainer(
            nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd, autocast=autocast
        )
        first = trainer.step(*batches[0]).losses
        _train(trainer, batches[1:])
        losses.append((first, trainer.step(*batches[0]).losses))
        assert all(p.dtype == torch.float32 for g in trainer.groups for p in g.parameters())
    assert losses[1][1][-1] < 0.5 * losses[1][0][-1]
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=3e-2, atol=3e-2)


def test_channels_last_and_compiled_groups_train_the_same_network() -> None:
    batches = nets.batches(3)
    plain = nets.state(
        _train(lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd), batches)
    )
    last = _train(
        lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd, channels_last=True),
        batches,
    )
    conv = next(p for p in last.groups[1].layers.parameters() if p.dim() == 4)
    assert conv.is_contiguous(memory_format=torch.channels_last)
    for name, value in nets.state(last).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_torch_compile_on_groups() -> None:
    batches = nets.batches(3)
    two = [nets.groups(lct.LocalCritic(), 2) for _ in range(2)]
    plain, compiled = (
        _train(lct.Trainer(g, lct.LocalCritic(), optimizer=_sgd, compile=c), batches)
        for g, c in zip(two, (False, True), strict=True)
    )
    for name, value in nets.state(compiled).items():
        torch.testing.assert_close(value, nets.state(plain)[name], rtol=1e-3, atol=1e-4)


def test_bytes_are_counted() -> None:
    for codec, size in (("none", 4), ("bf16", 2)):
        trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), codec=codec)
        stats = trainer.step(*nets.batches(1)[0])
        values = sum(torch.Size(g.shape).numel() for g in trainer.groups[:-1])
        assert stats.wire_bytes == trainer.meter.wire_bytes == 16 * values * size
        assert trainer.meter.raw_bytes == 16 * values * 4
        # One fp32 loss a sample over each of three cuts.
        assert trainer.meter.feedback_bytes == 16 * 4 * 3


def test_a_codec_changes_what_the_next_group_sees_and_nothing_before() -> None:
    x, y = nets.batches(1)[0]
    losses = {}
    for codec in ("none", "bf16"):
        trainer = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), codec=codec)
        losses[codec] = trainer.step(x, y).losses
    groups = nets.groups(lct.Greedy())
    h = groups[0].layers(x).detach().bfloat16().float()
    expected = F.cross_entropy(groups[1].critic(groups[1].layers(h)), y)
    assert losses["bf16"][0] == losses["none"][0]
    assert losses["bf16"][1] != losses["none"][1]
    assert losses["bf16"][1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_changes_nothing_and_exits_agree_with_modules() -> None:
    trainer = _train(lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic()), nets.batches(4))
    before = nets.state(trainer)
    x, y = nets.batches(1, rows=40)[0]
    result = trainer.evaluate([(x[:25], y[:25]), (x[25:], y[25:])])
    assert nets.same(before, nets.state(trainer)) and trainer.groups[0].training
    for k in range(1, 5):
        logits = trainer.module(exit=k).eval()(x)
        assert result.accuracy[k - 1] == pytest.approx((logits.argmax(1) == y).double().mean().item())
        assert result.loss[k - 1] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.relu_())


def test_coded_evaluation_sends_what_training_sends() -> None:
    codec = ["int2", "vq:4,2", "none"]
    trainer = _train(lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), codec=codec), nets.batches(3))
    assert trainer.lossy and not lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy()).lossy
    x, y = nets.batches(1, seed=9)[0]
    plain, coded = (trainer.evaluate([(x, y)], coded) for coded in (False, True))
    assert plain is not None and coded is not None
    # Exit 1 is before the first cut.
    assert coded.loss[0] == plain.loss[0]
    h, expected = x, []
    for worker, behind in zip(trainer.workers, [*trainer.workers[1:], None], strict=True):
        h, score = worker.evaluate(h, y)
        expected.append(float(score[0]) / len(x))
        if behind is not None and worker.encoder is not None and behind.decoder is not None:
            h = behind.decoder.decode(worker.encoder.encode(h, learn=False))
    assert coded.loss == expected
    assert coded.loss[1] != plain.loss[1] and coded.loss[2] != plain.loss[2]
    wire = trainer.meter.wire_bytes
    trainer.evaluate([(x, y)], coded=True)
    assert trainer.meter.wire_bytes == wire


def test_refusals_name_the_cause() -> None:
    trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic())
    x, y = nets.batches(1)[0]
    before = nets.state(trainer)
    nan = x.clone()
    nan[3, 0, 2, 2] = float("nan")
    wrong = y.clone()
    wrong[5] = 5
    cases = [
        (nan, y, lct.NonFiniteError, "input of batch 0 holds NaN"),
        (x, wrong, ValueError, "expected 0..4 or -100 .ignored., got 5"),
        (x, y[:7], ValueError, "one batch"),
        (x, y.float(), ValueError, r"soft labels: expected \[16, 5\]"),
        (x, torch.full((16, 5), float("nan")), lct.NonFiniteError, "target of batch 0 holds NaN"),
        (x.numpy(), y, ValueError, "expected tensors, inputs and targets, got ndarray and Tensor"),
        (x, y.int(), ValueError, "labels: expected int64"),
        (x[:0], y[:0], ValueError, "at least one sample"),
    ]
    for bad_x, bad_y, error, message in cases:
        with pytest.raises(error, match=message):
            trainer.step(bad_x, bad_y)
    assert nets.same(nets.state(trainer), before)
    assert all(p.grad is None for g in trainer.groups for p in g.parameters())

    diverging = lct.Trainer(
        nets.groups(lct.Greedy()), lct.Greedy(), optimizer=lambda p: torch.optim.SGD(p, 1e30)
    )
    with pytest.raises(lct.NonFiniteError, match=r"loss of group \d at batch \d is NaN or Inf"):
        _train(diverging, nets.batches(5))

    groups = lct.split(
        nn.Sequential(nn.Linear(4, 4), InPlace()), example_input=torch.randn(4, 4), split_points=["1"]
    )
    with pytest.raises(RuntimeError, match="group 2 changed its input in place"):
        lct.Trainer(groups, lct.Greedy()).step(torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))

    for arguments, message in [
        ({"codec": "zip"}, "unknown codec 'zip': choose one of none"),
        ({"feedback_delay": -1}, "feedback_delay"),
        ({"accumulate": 0}, "accumulate"),
        ({"num_classes": 3}, "num_classes=3, but the model's output has 5"),
        ({"autocast": torch.float16}, "autocast"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), **arguments)  # type: ignore[arg-type]


def test_backends_of_the_op_train_the_same_network() -> None:
    """reference and the CPU kernels: same losses within fp32 rounding."""
    batches = nets.batches(4)
    losses = []
    for backend in ("reference", "cpu"):
        if lct.ops.backends("critic_head")[backend] != "available":
            pytest.skip(f"backend {backend}: {lct.ops.backends('critic_head')[backend]}")
        trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), optimizer=_sgd)
        with lct.use_backend(backend):
            losses.append(torch.stack([trainer.step(x, y).losses for x, y in batches]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    groups = nets.groups(lct.Greedy())
    others = nets.groups(lct.Greedy())
    for wrong, message in [
        (nets.net(), "groups: expected at least one group of lct.split, got a Sequential"),
        ([nets.net()], "groups: expected those of lct.split, got a Sequential among them"),
        (None, "groups: expected at least one group of lct.split, got none"),
        (groups[:3], r"groups: expected all 4 of one lct.split, in order \(.*\), got 3"),
        (groups[::-1], "groups: expected all 4 of one lct.split, in order"),
        ([groups[0], *groups[:3]], "groups: expected all 4 of one lct.split, in order"),
        ([*groups[:3], others[3]], "groups: expected all 4 of one lct.split, in order"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.Trainer(wrong, lct.Greedy())  # type: ignore[arg-type]
    for method in ("greedy", lct.Greedy):
        with pytest.raises(ValueError, match=r"method: expected one such as lct.LocalCritic\(\), got"):
            lct.Trainer(groups, method)  # type: ignore[arg-type]
    nan = float("nan")
    for arguments, message in [
        # A negative norm would turn gradients round; half a batch is never due.
        *(({"clip_norm": v}, "clip_norm: expected a positive number") for v in (0.0, -1.0, nan, "1")),
        *(({"accumulate": v}, "accumulate: expected an integer >= 1") for v in (1.5, True, "2")),
        *(({"feedback_delay": v}, "feedback_delay: expected an integer >= 0") for v in (1.5, "2")),
        ({"diagnose": 1.5}, "diagnose: expected an integer >= 0"),
        ({"optimizer": lambda p: None}, "optimizer: expected a function that returns one, got None"),
        ({"scheduler": lambda o: None}, "scheduler: expected a function that returns one, got None"),
        ({"devices": "cpu"}, r"devices: expected a list, such as \['cpu'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.Trainer(groups, lct.Greedy(), **arguments)  # type: ignore[arg-type]
    trainer = lct.Trainer(groups, lct.Greedy())
    for rate in (nan, -0.1, float("inf")):
        with pytest.raises(ValueError, match="learning rate: expected a number >= 0"):
            trainer.set_learning_rate(rate)
    for number in (0, 5, 1.5, "2"):
        with pytest.raises(ValueError, match=r"exit: expected 1..4, got"):
            trainer.module(exit=number)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy])
def test_soft_labels_of_any_precision_give_the_same_step(method: type[lct.Method]) -> None:
    x, _ = nets.batches(1)[0]
    soft = torch.randint(0, 8, (16, 5)) / 8
    states = []
    for dtype in (torch.float32, torch.float64):
        trainer = lct.Trainer(nets.groups(method()), method())
        for _ in range(2):
            assert trainer.step(x, soft.to(dtype)).losses.dtype == torch.float32
        states.append(nets.state(trainer))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_evaluation_refuses_what_does_not_fit(schedule: str) -> None:
    trainer = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), schedule=schedule)
    good, (x, y) = nets.batches(2)
    for wrong, message in [
        (y + 5, "label out of range at batch 1: expected 0..4 or -100"),
        (y.int(), "labels: expected int64"),
        (y[:3], "inputs and targets of one batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.evaluate([good, (x, wrong)])
    found = trainer.evaluate([good, (x, torch.full_like(y, -100))])
    assert found is not None and found.samples == 32
