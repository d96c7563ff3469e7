"""Cross entropy: a program has a few rows whole; the order of the sums is fixed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2
from h_net_dynamic_chunking.ops._triton.partial_sums import column_sums

_ELEMENTS = 4096  # of a program
_IGNORED = tl.constexpr(-100)


@triton.jit(do_not_specialize=["T"])
def cross_entropy_fwd_kernel(
    logits, labels, partial, T, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BLOCK_V)
    b_label = tl.load(labels + o_t, mask=o_t < T, other=_IGNORED)
    m_row = (b_label != _IGNORED)[:, None] & (o_v < V)[None, :]
    p_row = logits + o_t[:, None] * V + o_v[None, :]
    b_logit = tl.load(p_row, mask=m_row, other=-float("inf")).to(tl.float32)
    b_logit = tl.where((b_label != _IGNORED)[:, None], b_logit, 0.0)
    b_most = tl.max(b_logit, axis=1)
    b_sum = tl.sum(tl.exp(b_logit - b_most[:, None]), axis=1)
    m_label = (b_label >= 0) & (b_label < V)
    # Of a label that is none: not a number.
    b_hit = o_v[None, :] == b_label[:, None]
    b_chosen = tl.where(m_label, tl.sum(tl.where(b_hit, b_logit, 0.0), axis=1), float("nan"))
    b_loss = b_most + tl.log(b_sum) - b_chosen
    tl.store(partial + i_b, tl.sum(tl.where(b_label != _IGNORED, b_loss, 0.0)))


@triton.jit(do_not_specialize=["T"])
def cross_entropy_bwd_kernel(
    grad,
    logits,
    labels,
    grad_logits,
    T,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BLOCK_V)
    m_row = (o_t < T)[:, None] & (o_v < V)[None, :]
    o_x = o_t[:, None] * V + o_v[None, :]
    b_label = tl.load(labels + o_t, mask=o_t < T, other=_IGNORED)
    b_logit = tl.load(logits + o_x, mask=m_row, other=-float("inf")).to(tl.float32)
    b_logit = tl.where((o_t < T)[:, None], b_logit, 0.0)
    b_part = tl.exp(b_logit - tl.max(b_logit, axis=1)[:, None])
    b_part = b_part / tl.sum(b_part, axis=1)[:, None]
    b_part -= (o_v[None, :] == b_label[:, None]).to(tl.float32)
    b_grad = tl.where((b_label != _IGNORED)[:, None], b_part * tl.load(grad).to(tl.float32), 0.0)
    tl.store(grad_logits + o_x, b_grad.to(grad_logits.dtype.element_ty), mask=m_row)


def _constants(vocab: int) -> dict[str, int]:
    block = power_of_2(vocab)
    return {"V": vocab, "BLOCK_V": block, "ROWS": max(1, _ELEMENTS // block)}


def cross_entropy_fwd(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum, a float32 scalar."""
    total, constants = len(logits), _constants(logits.shape[1])
    programs = cdiv(total, constants["ROWS"])
    partial = torch.empty(programs, 1, dtype=torch.float32, device=logits.device)
    launch(
        cross_entropy_fwd_kernel,
        programs,
        {
            "logits": logits.contiguous(),
            "labels": labels.contiguous(),
            "partial": partial,
            "T": total,
        },
        constants,
        num_warps=4,
    )
    return column_sums(partial, torch.float32).view(())


def cross_entropy_bwd(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype."""
    total, constants = len(logits), _constants(logits.shape[1])
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        cross_entropy_bwd_kernel,
        cdiv(total, constants["ROWS"]),
        {
            "grad": grad.contiguous(),
            "logits": logits.contiguous(),
            "labels": labels.contiguous(),
            "grad_logits": grad_logits,
            "T": total,
        },
        constants,
        num_warps=4,
    )
    return grad_logits
