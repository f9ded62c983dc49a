"""bn_relu_pool in plain torch: batch norm, ReLU and average pooling, and their gradients.

    mean_c, var_c = mean and biased variance of x[:, c]           or the given ones
    rstd_c   = 1 / sqrt(var_c + eps)
    xhat     = (x - mean) * rstd
    z        = gamma * xhat + beta
    y        = relu(z)
    pooled_w = mean of relu(z) over window w                      P x P windows of H/P x W/P
    active   = not (z <= 0)                                       so NaN counts, as in torch's relu
    moments  = means over window w of active, and of active * xhat

    g        = active * (dy + dpooled_w / area)                   never in memory
    dbeta_c  = sum g                                              = sum_nw dpooled * moments[0] without dy
    dgamma_c = sum g * xhat                                       = sum_nw dpooled * moments[1] without dy
    dx       = gamma * rstd * (g - dbeta / M - xhat * dgamma / M)   M = N H W; batch statistics
    dx       = gamma * rstd * g                                     given statistics

Everything is computed in float32 (float64 for float64 input) and rounded once, on output: pooled is made from
relu(z) before it is rounded. Works on any device. Batch norm is arXiv 1502.03167's.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_channel(x: Tensor) -> Tensor:
    return x[None, :, None, None]


def _window(x: Tensor, pool: int) -> tuple[int, int]:
    return x.shape[2] // pool, x.shape[3] // pool


def bn_relu_pool(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch norm, ReLU and the average over pool x pool windows.

    Args:
        x: [N, C, H, W]; pool divides H and W.
        gamma, beta: [C], scale and shift.
        given_mean, given_var: [C], or None and None for the batch's own.
        eps: added to the variance.
        pool: P, windows a side.

    Returns:
        y [N, C, H, W] and pooled [N, C, P, P] in x's dtype; mean [C], biased variance [C] and moments
        [2, N, C, P, P], what the backward needs, fp32 (fp64 for fp64 input). N = 0 gives mean 0, variance 0.
    """
    accumulator = _accumulator(x.dtype)
    wide = x.to(accumulator)
    if given_mean is not None and given_var is not None:
        mean, var = given_mean.to(accumulator, copy=True), given_var.to(accumulator, copy=True)
    elif x.numel() == 0:
        mean, var = wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
    else:
        mean = wide.mean((0, 2, 3))
        var = (wide - _by_channel(mean)).square().mean((0, 2, 3))
    xhat = (wide - _by_channel(mean)) * _by_channel((var + eps).rsqrt())
    z = xhat * _by_channel(gamma.to(accumulator)) + _by_channel(beta.to(accumulator))
    active = ~(z <= 0)
    window = _window(x, pool)
    pooled = avg_pool2d(z.relu(), window)
    moments = torch.stack(
        [avg_pool2d(active.to(accumulator), window), avg_pool2d(torch.where(active, xhat, 0.0), window)]
    )
    return z.relu().to(x.dtype), pooled.to(x.dtype).contiguous(), mean, var, moments.contiguous()


def bn_relu_pool_backward(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `bn_relu_pool` at x, gamma and beta.

    Args:
        dy: [N, C, H, W], or None where y itself has no gradient.
        dpooled: [N, C, P, P].
        x, gamma, beta, eps: as they were given.
        mean, var, moments: as they were returned.
        batch_statistics: whether mean and var came from x.

    Returns:
        dx [N, C, H, W] in x's dtype; dgamma [C] and dbeta [C], fp32 (fp64 for fp64 input).
    """
    accumulator = _accumulator(x.dtype)
    rstd = (var + eps).rsqrt()
    xhat = (x.to(accumulator) - _by_channel(mean)) * _by_channel(rstd)
    z = xhat * _by_channel(gamma.to(accumulator)) + _by_channel(beta.to(accumulator))
    height, width = _window(x, dpooled.shape[2])
    dpooled = dpooled.to(accumulator)
    g = (dpooled / (height * width)).repeat_interleave(height, 2).repeat_interleave(width, 3)
    if dy is not None:
        g = g + dy.to(accumulator)
    g = torch.where(z <= 0, 0.0, g)
    if dy is None:
        dbeta, dgamma = ((dpooled * moment).sum((0, 2, 3)) for moment in moments)
    else:
        dbeta, dgamma = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    factor = gamma.to(accumulator) * rstd
    if batch_statistics:
        count = max(x.numel() // x.shape[1], 1)
        g = g - _by_channel(dbeta / count) - xhat * _by_channel(dgamma / count)
    return (g * _by_channel(factor)).to(x.dtype), dgamma, dbeta
