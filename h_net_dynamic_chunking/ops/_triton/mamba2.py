"""What stands between the two projections of a Mamba-2 layer, forward and backward, on the kernels.

Backward, each kernel writes its share of one gradient of the projected rows, into a slice of it.
"""

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd, conv_fwd
from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd, gated_norm_fwd
from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids
from h_net_dynamic_chunking.ops._triton.ssd_backward import ssd_bwd
from h_net_dynamic_chunking.ops._triton.ssd_forward import ssd_fwd
from h_net_dynamic_chunking.ops._triton.time_step import time_step_bwd, time_step_fwd


def mamba2_fwd(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The normed rows, and y (total, d_inner) before the gate. Arguments as in `ops.mamba2`."""
    gate, conv_in, raw = _split(projected, norm_weight, A_log)
    sequence, batch = sequence_ids(cu_seqlens, len(projected)), len(cu_seqlens) - 1
    convolved = conv_fwd(conv_in, conv_weight, conv_bias, sequence, batch)
    dt = time_step_fwd(raw, dt_bias, cu_seqlens)
    x, B, C = _split_heads(convolved, norm_weight, A_log)
    y, _ = ssd_fwd(x, dt, -A_log.float().exp(), B, C, D, cu_seqlens)
    y = y.flatten(1)
    return gated_norm_fwd(y, gate, norm_weight, eps, cu_seqlens), y


def mamba2_bwd(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the projected rows and of the six parameters, in the order of the arguments."""
    gate, conv_in, raw = _split(projected, norm_weight, A_log)
    grad_projected = torch.empty_like(projected)
    grad_gate, grad_conv_in, grad_raw = _split(grad_projected, norm_weight, A_log)
    grad_y, grad_norm = gated_norm_bwd(grad, y, gate, norm_weight, eps, cu_seqlens, grad_gate)

    # Cheaper to have again than to keep: a tenth of what the layer keeps for 2 % of its time.
    sequence, batch = sequence_ids(cu_seqlens, len(projected)), len(cu_seqlens) - 1
    convolved = conv_fwd(conv_in, conv_weight, conv_bias, sequence, batch)
    dt = time_step_fwd(raw, dt_bias, cu_seqlens)
    A = -A_log.float().exp()
    x, B, C = _split_heads(convolved, norm_weight, A_log)
    grad_convolved, grad_dt = torch.empty_like(convolved), torch.empty_like(dt)
    grad_x, grad_B, grad_C = _split_heads(grad_convolved, norm_weight, A_log)
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
        grad_convolved, conv_in, conv_weight, conv_bias, sequence, batch, grad_conv_in
    )
    grad_A_log = (grad_A * A).to(A_log.dtype)
    return (
        grad_projected,
        grad_weight,
        grad_bias,
        grad_dt_bias,
        grad_A_log,
        grad_D.to(D.dtype),
        grad_norm,
    )


def _split(projected: Tensor, norm_weight: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slices (total, ...): gate d_inner, input of the convolution, dt heads."""
    d_inner, heads = len(norm_weight), len(A_log)
    gate, conv_in, raw = projected.split(
        [d_inner, projected.shape[1] - d_inner - heads, heads], dim=1
    )
    return gate, conv_in, raw


def _split_heads(
    convolved: Tensor, norm_weight: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices: x (total, heads, head_dim), B and C (total, d_state)."""
    d_inner, heads = len(norm_weight), len(A_log)
    d_state = (convolved.shape[1] - d_inner) // 2
    x, B, C = convolved.split([d_inner, d_state, d_state], dim=1)
    return x.unflatten(1, (heads, d_inner // heads)), B, C
