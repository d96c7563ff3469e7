"""What stands between the two projections of a Mamba-2 layer, forward and backward, on the kernels.

Backward, each kernel writes its share of one gradient of the projected rows, into a slice of it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd, conv_fwd
from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd, gated_norm_fwd
from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids
from h_net_dynamic_chunking.ops._triton.ssd_backward import ssd_bwd
from h_net_dynamic_chunking.ops._triton.ssd_forward import ssd_fwd
from h_net_dynamic_chunking.ops._triton.time_step import time_step_bwd, time_step_fwd

if TYPE_CHECKING:
    from h_net_dynamic_chunking.ops.mamba2 import Mamba2Parameters


def mamba2_fwd(
    projected: Tensor, parameters: "Mamba2Parameters", eps: float, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The normed rows, and y before the gate, both (total, d_inner); of projected (total, ...)."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.split(projected)
    ids = sequence_ids(cu_seqlens, len(projected))
    convolved = conv_fwd(conv_in, conv_weight, conv_bias, *ids)
    dt = time_step_fwd(raw, dt_bias, cu_seqlens)
    x, B, C = parameters.split_conv(convolved)
    y, _ = ssd_fwd(x, dt, -A_log.float().exp(), B, C, D, cu_seqlens)
    y = y.flatten(1)
    return gated_norm_fwd(y, gate, norm_weight, eps, cu_seqlens), y


def mamba2_bwd(
    grad: Tensor,
    projected: Tensor,
    parameters: "Mamba2Parameters",
    eps: float,
    cu_seqlens: Tensor,
    y: Tensor,
    grad_projected: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write the gradient of the projected rows; return those of the parameters, in their order."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.split(projected)
    grad_gate, grad_conv_in, grad_raw = parameters.split(grad_projected)
    grad_y, grad_norm = gated_norm_bwd(grad, y, gate, norm_weight, eps, cu_seqlens, grad_gate)

    # Cheaper to have again than to keep: a tenth of what the layer keeps for 2 % of its time.
    ids = sequence_ids(cu_seqlens, len(projected))
    convolved = conv_fwd(conv_in, conv_weight, conv_bias, *ids)
    dt, A = time_step_fwd(raw, dt_bias, cu_seqlens), -A_log.float().exp()
    x, B, C = parameters.split_conv(convolved)
    grad_convolved, grad_dt = torch.empty_like(convolved), torch.empty_like(dt)
    grad_x, grad_B, grad_C = parameters.split_conv(grad_convolved)
    grad_A, grad_D = ssd_bwd(
        grad_y.view(x.shape),
        x,
        dt,
        A,
        B,
        C,
        D,
        cu_seqlens,
        None,
        grad_x=grad_x,
        grad_dt=grad_dt,
        grad_B=grad_B,
        grad_C=grad_C,
    )
    grad_dt_bias = time_step_bwd(grad_dt, raw, dt_bias, cu_seqlens, grad_raw)
    grad_weight, grad_bias = conv_bwd(
        grad_convolved, conv_in, conv_weight, conv_bias, *ids, grad_conv_in
    )
    grad_A_log = (grad_A * A).to(A_log.dtype)
    return grad_weight, grad_bias, grad_dt_bias, grad_A_log, grad_D.to(D.dtype), grad_norm
