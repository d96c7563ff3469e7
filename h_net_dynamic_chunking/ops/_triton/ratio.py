"""The pooled ratio loss: sums of blocks, then the formula; the order of the sums is fixed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

_BLOCK = 4096


@triton.jit(do_not_specialize=["T", "B"])
def ratio_sums_kernel(mask, p, cu, boundaries, probability, T, B, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    m_live = (o_t < T) & (o_t < tl.load(cu + B).to(tl.int64))
    b_mask = tl.load(mask + o_t, mask=m_live, other=0) != 0
    b_p = tl.load(p + o_t, mask=m_live, other=0).to(tl.float32)
    tl.store(boundaries + i_b, tl.sum(b_mask.to(tl.float32)))
    tl.store(probability + i_b, tl.sum(b_p))


@triton.jit(do_not_specialize=["T", "B", "blocks"])
def ratio_loss_kernel(
    boundaries, probability, cu, loss, slope, T, B, blocks, n, BLOCK: tl.constexpr
):
    b_boundaries = tl.zeros([BLOCK], dtype=tl.float32)
    b_probability = tl.zeros([BLOCK], dtype=tl.float32)
    for i_b in range(0, blocks, BLOCK):
        o_b = i_b + tl.arange(0, BLOCK)
        b_boundaries += tl.load(boundaries + o_b, mask=o_b < blocks, other=0)
        b_probability += tl.load(probability + o_b, mask=o_b < blocks, other=0)
    count = tl.minimum(tl.load(cu + B).to(tl.int64), T)
    size = tl.maximum(count, 1).to(tl.float32)
    f = tl.sum(b_boundaries) / size
    g = tl.sum(b_probability) / size
    value = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
    tl.store(loss, tl.where(count > 0, value, 0.0))
    tl.store(slope, n / (n - 1) * (n * f - 1) / size)


@triton.jit(do_not_specialize=["T", "B"])
def ratio_grad_kernel(grad, slope, cu, grad_p, T, B, BLOCK: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_live = o_t < tl.load(cu + B).to(tl.int64)
    value = tl.load(grad).to(tl.float32) * tl.load(slope)
    b_grad = tl.where(m_live, value, 0.0).to(grad_p.dtype.element_ty)
    tl.store(grad_p + o_t, b_grad, mask=o_t < T)


def ratio_loss_fwd(
    boundary_mask: Tensor, probs: Tensor, cu_seqlens: Tensor, target_ratio: float
) -> tuple[Tensor, Tensor]:
    """The loss and its slope, float32 scalars."""
    total, batch, blocks = len(probs), len(cu_seqlens) - 1, cdiv(len(probs), _BLOCK)
    cu_seqlens = cu_seqlens.contiguous()
    boundaries = torch.empty(blocks, dtype=torch.float32, device=probs.device)
    probability, loss = torch.empty_like(boundaries), boundaries.new_empty(())
    slope = torch.empty_like(loss)
    launch(
        ratio_sums_kernel,
        blocks,
        {
            "mask": boundary_mask.contiguous(),
            "p": probs.contiguous(),
            "cu": cu_seqlens,
            "boundaries": boundaries,
            "probability": probability,
            "T": total,
            "B": batch,
        },
        {"BLOCK": _BLOCK},
        num_warps=8,
    )
    launch(
        ratio_loss_kernel,
        1,
        {
            "boundaries": boundaries,
            "probability": probability,
            "cu": cu_seqlens,
            "loss": loss,
            "slope": slope,
            "T": total,
            "B": batch,
            "blocks": blocks,
            "n": float(target_ratio),
        },
        {"BLOCK": 256},
        num_warps=4,
    )
    return loss, slope


def ratio_loss_bwd(grad: Tensor, slope: Tensor, probs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient of the probabilities: one value at every position of a sequence."""
    grad_p = torch.empty_like(probs, memory_format=torch.contiguous_format)
    launch(
        ratio_grad_kernel,
        cdiv(len(probs), _BLOCK),
        {
            "grad": grad,
            "slope": slope,
            "cu": cu_seqlens.contiguous(),
            "grad_p": grad_p,
            "T": len(probs),
            "B": len(cu_seqlens) - 1,
        },
        {"BLOCK": _BLOCK},
        num_warps=8,
    )
    return grad_p
