"""The ops: schema, shape functions, autograd and choice of backend. One file a stem.

Importing this registers the ops with torch under `torch.ops.lct`; it loads no binary and compiles nothing.
"""

from lct_fast.ops.backend import BackendError, backends, names, use_backend
from lct_fast.ops.block_quantize import BlockQuantized, block_dequantize, block_quantize
from lct_fast.ops.bn_relu_pool import BnReluPool, bn_relu_pool
from lct_fast.ops.consensus import ConsensusAdjoint, ConsensusUpdate, consensus_adjoint, consensus_update
from lct_fast.ops.critic_head import CriticHead, critic_head, critic_head_wgrad
from lct_fast.ops.group_linear import UNFUSED_CLASSES, GroupLinear, group_linear
from lct_fast.ops.linear_cross_entropy import linear_cross_entropy
from lct_fast.ops.perturb import normal_quantile, perturb, score
from lct_fast.ops.vq import VQEncoding, VQState, vq_decode, vq_encode, vq_state, vq_update

__all__ = [
    "BackendError",
    "BlockQuantized",
    "BnReluPool",
    "ConsensusAdjoint",
    "ConsensusUpdate",
    "CriticHead",
    "UNFUSED_CLASSES",
    "GroupLinear",
    "VQEncoding",
    "VQState",
    "backends",
    "block_dequantize",
    "block_quantize",
    "bn_relu_pool",
    "consensus_adjoint",
    "consensus_update",
    "critic_head",
    "critic_head_wgrad",
    "group_linear",
    "linear_cross_entropy",
    "names",
    "normal_quantile",
    "perturb",
    "score",
    "use_backend",
    "vq_decode",
    "vq_encode",
    "vq_state",
    "vq_update",
]
