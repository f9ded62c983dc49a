"""From options to the method that they describe."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from lct_fast.cli.options import LAYER_PARALLEL, Config
from lct_fast.methods import METHODS, LayerParallel, LikelihoodRatio, LocalCritic, Method


def build_method(config: Config) -> Method:
    """The method of a run.

    Raises:
        ValueError: an option of it out of range, in one line.
    """
    if config.method == LocalCritic.name:
        return LocalCritic(
            config.critic_every,
            config.critic_loss,
            partial(_critic_optimizer, config),
            target=config.critic_target,
        )
    if config.method in LAYER_PARALLEL:
        return LayerParallel(config.method.replace("-", "_"), config.beta, config.eta, config.auxiliary)
    if config.method == LikelihoodRatio.name:
        return likelihood_ratio(config)
    return METHODS[config.method]()


def likelihood_ratio(config: Config) -> LikelihoodRatio:
    """The method that the options describe."""
    return LikelihoodRatio(
        config.noise,
        config.copies,
        config.sigma,
        config.antithetic,
        config.one_at_a_time,
        config.sampling,
        config.baseline,
        config.learn_sigma,
        config.storage,
    )


def _critic_optimizer(config: Config, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.Adam(params, config.critic_lr, fused=on_cuda(params))


def on_cuda(params: list[nn.Parameter]) -> bool:
    """Whether torch's fused optimisers are the faster ones, and can be part of a CUDA graph."""
    return all(p.is_cuda for p in params)
