"""The definition of consensus against autograd, and what its fixed points are."""

import torch

from lct_fast.reference.consensus import consensus_adjoint, consensus_update


def state(seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 7, generator=draw, dtype=torch.float64) for _ in range(4))


def test_p_is_the_gradient_of_the_loss() -> None:
    lambda_, kappa, x, _ = state()
    for multipliers in (kappa, None):
        leaf = x.clone().requires_grad_()
        loss, p = consensus_adjoint(leaf, lambda_, multipliers, 0.3)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(p.detach(), gradient, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_loss() -> None:
    lambda_, kappa, x, _ = state(1)
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: consensus_adjoint(v, lambda_, kappa, 0.3)[0], (leaf,))


def test_the_update_steps_down_the_slope_of_the_whole_loss() -> None:
    """At lambda the whole loss has the slope of the group behind, p, and that of the loss of the group before."""
    lambda_, kappa, x, p = state(2)
    leaf = lambda_.clone().requires_grad_()
    whole = (p * leaf).sum() + consensus_adjoint(x, leaf, kappa, 0.3)[0].sum()
    (slope,) = torch.autograd.grad(whole, leaf)
    following, multipliers = consensus_update(lambda_, kappa, p, x, 0.3, 0.7)
    torch.testing.assert_close(following, lambda_ - 0.7 * slope, rtol=1e-12, atol=1e-12)
    assert multipliers is not None
    torch.testing.assert_close(multipliers, kappa - 0.3 * (following - x), rtol=1e-12, atol=1e-12)


def test_fixed_points_with_a_given_adjoint() -> None:
    """Penalty: the jump is -p / beta. With multipliers: no jump, and kappa is the adjoint."""
    _, _, x, p = state(3)
    for beta in (0.1, 1.0):
        lambda_, eta = x.clone(), 0.2 / beta
        for _ in range(200):
            lambda_, none = consensus_update(lambda_, None, p, x, beta, eta)
        assert none is None
        torch.testing.assert_close(lambda_ - x, -p / beta, rtol=1e-9, atol=1e-9)
        lambda_, kappa = x.clone(), torch.zeros_like(x)
        for _ in range(2000):
            lambda_, after = consensus_update(lambda_, kappa, p, x, beta, eta)
            assert after is not None
            kappa = after
        torch.testing.assert_close(lambda_, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(kappa, p, rtol=1e-9, atol=1e-9)


def test_one_value_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, p = consensus_adjoint(3 * one, 5 * one, 0.5 * one, 0.1)
    # d = 2: 0.05 * 4 - 0.5 * 2 = -0.8; 0.5 - 0.2 = 0.3.
    assert abs(float(loss[0]) + 0.8) < 1e-12 and abs(float(p) - 0.3) < 1e-12
    following, kappa = consensus_update(5 * one, 0.5 * one, 2 * one, 3 * one, 0.1, 0.5)
    # 5 - 0.5 * (2 + 0.2 - 0.5) = 4.15; 0.5 - 0.1 * 1.15 = 0.385.
    assert kappa is not None
    assert abs(float(following) - 4.15) < 1e-12 and abs(float(kappa) - 0.385) < 1e-12
