"""Character models: shapes, causality, the state that goes on, where they are cut."""

import copy

import pytest
import torch
from torch import nn

from lct_fast import models
from lct_fast.models.recurrent import RecurrentLayer

SMALL = {
    "char_gru": "char_gru:layers=3,hidden=6",
    "char_lstm": "char_lstm:layers=3,hidden=6",
    "char_transformer": "char_transformer:layers=3,width=8,heads=2",
}
VOCABULARY, WINDOW = 7, 5


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


def ids(rows: int = 3, tokens: int = WINDOW) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens))


def test_names_lists_every_model() -> None:
    assert models.sequence_names() == sorted(SMALL)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_logits_and_gradients(spec: str) -> None:
    net = models.build_sequence(spec, VOCABULARY, WINDOW)
    x = ids(8)
    logits = net(x)
    assert logits.shape == (8, WINDOW, VOCABULARY)
    logits.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_no_token_sees_a_later_one(spec: str) -> None:
    net = models.build_sequence(spec, VOCABULARY, WINDOW).eval()
    x = ids()
    other = x.clone()
    other[:, 3] = (x[:, 3] + 1) % VOCABULARY
    before, after = net(x), net(other)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).flatten(2).any(2).all()


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_evaluation_is_a_function_of_its_input(spec: str) -> None:
    net = models.build_sequence(spec, VOCABULARY, WINDOW)
    net(ids(4))
    net.eval()
    x = ids()
    assert torch.equal(net(x), net(x))
    assert not any("carried" in name for name in net.state_dict())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_windows_go_on_as_one_long_one_in_training_and_evaluation(kind: str) -> None:
    layer = RecurrentLayer(kind, 4, 6)
    x = torch.randn(3, 12, 4)
    # An evaluation in two windows of other sizes, between those of training, changes neither.
    first = layer(x[:, :5])
    layer.eval()
    whole = layer(x)
    layer.go_on(True)
    evaluated = torch.cat([layer(x[:, :7]), layer(x[:, 7:])], 1)
    layer.go_on(False)
    assert torch.equal(layer(x), whole)
    layer.train()
    trained = torch.cat([first, layer(x[:, 5:])], 1)
    for found in (evaluated, trained):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    layer.begin_sequence()
    torch.testing.assert_close(layer(x[:, :5]), whole[:, :5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_no_gradient_crosses_a_window(kind: str) -> None:
    layer = RecurrentLayer(kind, 4, 6)
    x = torch.randn(2, 3, 4, requires_grad=True)
    layer(x)
    layer(torch.randn(2, 3, 4)).sum().backward()
    assert x.grad is None and not layer.carried.requires_grad


def test_another_number_of_rows() -> None:
    layer = RecurrentLayer("lstm", 4, 6)
    x = torch.randn(3, 10, 4)
    layer(x)
    with pytest.raises(ValueError, match="goes on from a window of 3 rows, got 2"):
        layer(x[:2])
    layer.begin_sequence()
    assert layer(x[:2]).shape == (2, 10, 6) and layer.carried.shape == (2, 2, 6)
    # The end of an evaluation: the first rows go on.
    layer.eval()
    layer.go_on(True)
    layer(x[:, :5])
    torch.testing.assert_close(layer(x[:2, 5:]), _afresh(layer, x[:2])[:, 5:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="goes on from a window of 2 rows, got 3"):
        layer(x)


def _afresh(layer: RecurrentLayer, x: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(layer)
    twin.go_on(False)
    return twin(x)


def test_bf16_keeps_its_state_in_fp32(threads: None) -> None:
    for kind in ("lstm", "gru"):
        layer = RecurrentLayer(kind, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                y = layer(torch.randn(2, 3, 4))
        assert y.isfinite().all() and layer.carried.dtype == torch.float32 and layer.carried.any()


@pytest.mark.parametrize("name", SMALL)
def test_cuts_share_the_layers_out(name: str) -> None:
    unit = {"char_gru": "gru", "char_lstm": "lstm", "char_transformer": "block"}[name]
    assert models.default_splits(name, 4) == [f"{unit}{k}" for k in (2, 3, 4)]
    assert models.default_splits(f"{name}:layers=6", 4) == [f"{unit}{k}" for k in (2, 4, 5)]
    assert models.default_splits(name, 1) == []
    assert models.default_splits(f"{name}:layers=2", 3) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("char_rnn", "unknown model 'char_rnn'.*choose one of char_gru, char_lstm, char_transformer"),
        ("lct_vgg", "'lct_vgg' is for images: choose one for text, char_gru"),
        ("char_lstm:hidden=0", "hidden must be at least 1, got 0"),
        ("char_lstm:width=2", "no option 'width'; its options and defaults: layers=4, hidden=256"),
        ("char_transformer:width=10,heads=4", "heads must divide width, got width=10, heads=4"),
        ("char_transformer:layers=0", "layers must be at least 1, got 0"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        models.build_sequence(spec, VOCABULARY, WINDOW)
    assert "\n" not in str(caught.value)


def test_images_and_texts_are_kept_apart_and_windows_bounded() -> None:
    with pytest.raises(ValueError, match="'char_lstm' is for text: choose one for images"):
        models.build("char_lstm", 10)
    with pytest.raises(ValueError, match="vocabulary must be at least 1"):
        models.build_sequence("char_lstm", 0, 4)
    net = models.build_sequence(SMALL["char_transformer"], VOCABULARY, WINDOW)
    assert net(ids(2, 3)).shape == (2, 3, VOCABULARY)
    with pytest.raises(ValueError, match="windows of at most 5 tokens, got 6"):
        net(ids(2, 6))


def test_every_cut_is_one_module() -> None:
    for spec in SMALL.values():
        net = models.build_sequence(spec, VOCABULARY, WINDOW)
        assert isinstance(net[-1], nn.Linear) and dict(net.named_children()).keys() >= {"embed", "head"}
