"""consensus in plain torch: what ties a group's output x to the stored input lambda of the group behind it.

Layer-parallel training (arXiv 2009.01462) lets go of lambda = x and puts a loss in its place:

    d       = lambda - x
    loss[n] = sum over features of  beta / 2 d^2 - kappa d
    p       = d loss / d x  =  kappa - beta d                      the terminal adjoint of the group before

    lambda' = lambda - eta (p_in + beta (lambda - x) - kappa)      p_in: the adjoint at the input of the group behind
    kappa'  = kappa - beta (lambda' - x)                           with the new lambda

Without kappa this is the penalty method, with it the augmented Lagrangian.
"""

import torch
from torch import Tensor


def consensus_adjoint(
    x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss of each row and the adjoint at x.

    Args:
        x: [N, D], any floating dtype.
        lambda_next: [N, D] float32 (float64 with float64 x). kappa: the same, or None for zeros.
        beta: the penalty's weight.

    Returns:
        loss [N] in lambda's dtype; p [N, D] in x's dtype.
    """
    d = lambda_next - x.to(lambda_next.dtype)
    k = torch.zeros_like(d) if kappa is None else kappa
    return (d * (0.5 * beta * d - k)).sum(1), (k - beta * d).to(x.dtype)


def consensus_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> tuple[Tensor, Tensor | None]:
    """The next lambda and kappa.

    Args:
        lambda_: any shape, float32 or float64. kappa: the same, or None.
        p: the adjoint at lambda_, per sample. x_prev: the output of the group before. Of lambda's shape.
        beta: the penalty's weight. eta: the step of lambda.

    Returns:
        lambda, and kappa or None, in lambda's dtype.
    """
    wide, x = p.to(lambda_.dtype), x_prev.to(lambda_.dtype)
    slope = wide + beta * (lambda_ - x)
    following = lambda_ - eta * (slope if kappa is None else slope - kappa)
    return following, None if kappa is None else kappa - beta * (following - x)
