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
    boundaries, probability, cu, loss, weighted, slope, T, B, blocks, n, alpha, BLOCK: tl.constexpr
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
    value = tl.where(count > 0, value, 0.0)
    tl.store(loss, value)
    tl.store(weighted, alpha * value)
    tl.store(slope, n / (n - 1) * (n * f - 1) / size)


@triton.jit(do_not_specialize=["T", "B"])
def ratio_grad_kernel(
    grad,
    grad_weighted,
    slope,
    other,
    cu,
    grad_p,
    T,
    B,
    alpha,
    HAS_GRAD: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_live = o_t < tl.load(cu + B).to(tl.int64)
    value = 0.0
    if HAS_GRAD:
        value += tl.load(grad).to(tl.float32)
    if HAS_WEIGHTED:
        value += alpha * tl.load(grad_weighted).to(tl.float32)
    b_grad = tl.where(m_live, value * tl.load(slope), 0.0)
    if HAS_OTHER:
        b_grad += tl.load(other + o_t, mask=o_t < T, other=0).to(tl.float32)
    tl.store(grad_p + o_t, b_grad.to(grad_p.dtype.element_ty), mask=o_t < T)


def ratio_loss_fwd(
    boundary_mask: Tensor,
    probs: Tensor,
    cu_seqlens: Tensor,
    target_ratio: float,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the loss times its weight, and its slope, float32 scalars."""
    total, batch = probs.shape[0], cu_seqlens.shape[0] - 1
    blocks = cdiv(total, _BLOCK)
    cu_seqlens = cu_seqlens.contiguous()
    boundaries = torch.empty(blocks, dtype=torch.float32, device=probs.device)
    probability, loss = torch.empty_like(boundaries), boundaries.new_empty(())
    weighted, slope = torch.empty_like(loss), torch.empty_like(loss)
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
            "weighted": weighted,
            "slope": slope,
            "T": total,
            "B": batch,
            "blocks": blocks,
            "n": float(target_ratio),
            "alpha": float(weight),
        },
        {"BLOCK": 256},
        num_warps=4,
    )
    return loss, weighted, slope


def ratio_loss_bwd(
    grad: Tensor | None,
    grad_weighted: Tensor | None,
    slope: Tensor,
    probs: Tensor,
    cu_seqlens: Tensor,
    weight: float,
    grad_probs: Tensor | None,
) -> Tensor:
    """The gradient of the probabilities: one value at every position of a sequence, added to what
    they have from elsewhere."""
    total = probs.shape[0]
    grad_p = torch.empty_like(probs, memory_format=torch.contiguous_format)
    launch(
        ratio_grad_kernel,
        cdiv(total, _BLOCK),
        {
            "grad": slope if grad is None else grad,
            "grad_weighted": slope if grad_weighted is None else grad_weighted,
            "slope": slope,
            "other": slope if grad_probs is None else grad_probs.contiguous(),
            "cu": cu_seqlens.contiguous(),
            "grad_p": grad_p,
            "T": total,
            "B": cu_seqlens.shape[0] - 1,
            "alpha": float(weight),
        },
        {
            "HAS_GRAD": grad is not None,
            "HAS_WEIGHTED": grad_weighted is not None,
            "HAS_OTHER": grad_probs is not None,
            "BLOCK": _BLOCK,
        },
        num_warps=8,
    )
    return grad_p
