"""value * silu(gate): a program has a stretch of the channels of one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2

_BLOCK = 4096  # at most; of 13120 x 4096 numbers it takes 97% of what 1024 does, both ways (H200)
_NUMBERS = 16  # of a thread


@triton.jit
def swiglu_fwd_kernel(x, out, W: tl.constexpr, BLOCK: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < W
    b_value = tl.load(x + i_t * 2 * W + o_w, mask=m_w, other=0).to(tl.float32)
    b_gate = tl.load(x + i_t * 2 * W + W + o_w, mask=m_w, other=0).to(tl.float32)
    b_out = b_value * b_gate * tl.sigmoid(b_gate)
    tl.store(out + i_t * W + o_w, b_out.to(out.dtype.element_ty), mask=m_w)


@triton.jit
def swiglu_bwd_kernel(grad, x, grad_x, W: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < W
    o_value, o_gate = i_t * 2 * W + o_w, i_t * 2 * W + W + o_w
    b_grad = tl.load(grad + i_t * W + o_w, mask=m_w, other=0).to(tl.float32)
    b_value = tl.load(x + o_value, mask=m_w, other=0).to(tl.float32)
    b_gate = tl.load(x + o_gate, mask=m_w, other=0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_grad_value = b_grad * b_gate * b_sigmoid
    b_grad_gate = b_grad * b_value * b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
    tl.store(grad_x + o_value, b_grad_value.to(grad_x.dtype.element_ty), mask=m_w)
    tl.store(grad_x + o_gate, b_grad_gate.to(grad_x.dtype.element_ty), mask=m_w)
    if AGAIN:
        # Bit by bit as forward. Nobody else reads this stretch of grad.
        b_out = b_value * b_gate * b_sigmoid
        tl.store(grad + i_t * W + o_w, b_out.to(grad.dtype.element_ty), mask=m_w)


def swiglu_fwd(x: Tensor) -> Tensor:
    """(..., 2 * width) -> (..., width)."""
    width, x = x.shape[-1] // 2, x.contiguous()
    block = min(_BLOCK, power_of_2(width))
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    launch(
        swiglu_fwd_kernel,
        (x.numel() // (2 * width), cdiv(width, block)),
        {"x": x, "out": out},
        {"W": width, "BLOCK": block},
        num_warps=max(1, block // (32 * _NUMBERS)),
    )
    return out


def swiglu_bwd(grad: Tensor, x: Tensor, again: bool = False) -> Tensor:
    """The gradient of both halves, in one tensor like x.

    again: whether `grad`, which must be contiguous then, becomes what `swiglu_fwd` returned
    """
    width, x = x.shape[-1] // 2, x.contiguous()
    block = min(_BLOCK, power_of_2(width))
    grad_x = torch.empty_like(x)
    launch(
        swiglu_bwd_kernel,
        (x.numel() // (2 * width), cdiv(width, block)),
        {"grad": grad.contiguous(), "x": x, "grad_x": grad_x},
        {"W": width, "BLOCK": block, "AGAIN": again},
        num_warps=max(1, block // (32 * _NUMBERS)),
    )
    return grad_x
