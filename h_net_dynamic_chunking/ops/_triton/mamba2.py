"""What stands between the two projections of a Mamba-2 layer, forward and backward, on the kernels.

Backward, each kernel writes its share of one gradient of the projected rows, into a slice of it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.causal_conv import conv_bwd, conv_continued, conv_fwd
from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd, gated_norm_fwd
from h_net_dynamic_chunking.ops._triton.sequence_ids import sequence_ids
from h_net_dynamic_chunking.ops._triton.ssd_backward import ssd_bwd
from h_net_dynamic_chunking.ops._triton.ssd_forward import ssd_fwd
from h_net_dynamic_chunking.ops._triton.time_step import time_step_bwd, time_step_fwd
from h_net_dynamic_chunking.ops.ssd import KERNEL_CHUNK_SIZE

if TYPE_CHECKING:
    from h_net_dynamic_chunking.ops.mamba2 import Mamba2Kept, Mamba2Parameters


def mamba2_fwd(
    projected: Tensor,
    parameters: "Mamba2Parameters",
    eps: float,
    cu_seqlens: Tensor,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normed rows, y before the gate and the convolved rows, all (total, ...); the states.

    projected:  (total, ...)
    rows:       sequences of one length, if all are; None for any others
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.sizes.split(projected)
    ids = sequence_ids(cu_seqlens, len(projected))
    convolved = conv_fwd(conv_in, conv_weight, conv_bias, *ids)
    dt = time_step_fwd(raw, dt_bias, cu_seqlens)
    x, B, C = parameters.sizes.split_conv(convolved)
    division = _division(x, cu_seqlens, rows)
    y, states = ssd_fwd(x, dt, -A_log.float().exp(), B, C, D, *division)
    y = y.flatten(1)
    return gated_norm_fwd(y, gate, norm_weight, eps, cu_seqlens), y, convolved, states


def mamba2_continued(
    projected: Tensor,
    parameters: "Mamba2Parameters",
    eps: float,
    conv: Tensor,
    state: Tensor,
    lens: Tensor | None,
) -> Tensor:
    """The normed rows (batch, length, d_inner) of `projected` (batch, length, ...), which go on.

    conv:   (batch, channels, taps - 1), contiguous: changes in place
    state:  (batch, heads, head_dim, d_state), float32, bfloat16 or float16, contiguous: changes in
            place, and is rounded once
    lens:   int (batch,): positions of each row, on the left; None: all have `length`
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.sizes.split(projected)
    convolved = conv_continued(conv_in, conv_weight, conv_bias, conv, lens).flatten(0, 1)
    # With dt = 0 a pad neither writes to the state nor decays it.
    dt = time_step_fwd(raw.flatten(0, 1), dt_bias, None, lens)
    x, B, C = parameters.sizes.split_conv(convolved)
    A = -A_log.float().exp()
    wide = state.float()
    y, _ = ssd_fwd(x, dt, A, B, C, D, None, len(projected), initial=wide, final=wide)
    if wide is not state:
        state.copy_(wide)
    gate = gate.flatten(0, 1)
    return gated_norm_fwd(y.flatten(1), gate, norm_weight, eps, None).view(*projected.shape[:2], -1)


def mamba2_bwd(
    grad: Tensor,
    projected: Tensor,
    parameters: "Mamba2Parameters",
    eps: float,
    cu_seqlens: Tensor,
    rows: int | None,
    kept: "Mamba2Kept",
    grad_projected: Tensor,
    out_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write the gradient of the projected rows; return those of the parameters, in their order.

    grad:  (total, ...), contiguous: of the product with out_weight, or of the normed rows where
           there is none; then nothing is returned for it
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    gate, conv_in, raw = parameters.sizes.split(projected)
    grad_gate, grad_conv_in, grad_raw = parameters.sizes.split(grad_projected)
    y, convolved = kept.y.view(gate.shape), kept.convolved.view(conv_in.shape)
    normed = grad if out_weight is None else grad @ out_weight  # its gradient, at first
    again = out_weight is not None
    grad_y, grad_norm = gated_norm_bwd(
        normed, y, gate, norm_weight, eps, cu_seqlens, grad_gate, again
    )
    grad_out_weight = grad.t() @ normed if again else grad.new_empty(0)
    # Before the recurrence takes most of what this function takes.
    del normed

    # Cheap to have again.
    ids = sequence_ids(cu_seqlens, len(projected))
    dt, A = time_step_fwd(raw, dt_bias, cu_seqlens), -A_log.float().exp()
    x, B, C = parameters.sizes.split_conv(convolved)
    grad_convolved, grad_dt = torch.empty_like(convolved), torch.empty_like(dt)
    grad_x, grad_B, grad_C = parameters.sizes.split_conv(grad_convolved)
    cu, count = _division(x, cu_seqlens, rows)
    grad_A, grad_D = ssd_bwd(
        grad_y.view(x.shape),
        x,
        dt,
        A,
        B,
        C,
        D,
        cu,
        kept.states if len(kept.states) else None,
        count,
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
    # Not a part of what holds both sums.
    grad_D = grad_D.to(D.dtype, copy=True)
    return grad_weight, grad_bias, grad_dt_bias, grad_A_log, grad_D, grad_norm, grad_out_weight


def _division(x: Tensor, cu_seqlens: Tensor, rows: int | None) -> tuple[Tensor | None, int]:
    """What `ssd_fwd` calls cu and rows. Rows are faster, but only those of whole chunks are as many
    chunks as if they were packed, which short rows would multiply."""
    if rows is None or len(x) % (rows * KERNEL_CHUNK_SIZE):
        return cu_seqlens, 1
    return None, rows
