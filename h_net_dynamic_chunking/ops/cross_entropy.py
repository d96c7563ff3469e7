"""Summed cross entropy of logits that stay in their own dtype: no wide copy of them is made.

    loss = sum_t logsumexp(logits_t) - logits_t[label_t]

Contract
    logits:  (total, vocab), float
    labels:  (total,), int64; `IGNORED` (-100) where there is nothing to predict
    out:     scalar, float32 (float64 for float64 logits)

The gradient has the dtype of the logits, rounded once. A label that is none: torch ends in an error
of its own, the kernels return NaN.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend, uses_triton
from h_net_dynamic_chunking.ops.packing import accumulation_dtype, check_packed
from h_net_dynamic_chunking.ops.registration import operation

IGNORED = -100
"""The label where there is nothing to predict."""

# A program of the kernels holds whole rows; of more bytes than these none is made.
_LARGEST_VOCABULARY = 4096


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum, in nats; the contract is at the top of this file.

    Raises:
        ValueError: shapes or dtypes off the contract.

    >>> summed_cross_entropy(torch.zeros(3, 256), torch.tensor([7, 0, -100])) / 2  # log 256
    tensor(5.5452)
    """
    check_packed("logits", logits, 2)
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({logits.shape[0]},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    loss: Tensor = _cross_entropy(logits, labels)
    return loss


@operation("cross_entropy")
def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if _runs_on_triton(logits):
        from h_net_dynamic_chunking.ops._triton.cross_entropy import cross_entropy_fwd

        return cross_entropy_fwd(logits, labels)
    wide = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")


@_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty((), dtype=accumulation_dtype(logits.dtype))


@operation("cross_entropy_backward")
def _cross_entropy_backward(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    if _runs_on_triton(logits):
        from h_net_dynamic_chunking.ops._triton.cross_entropy import cross_entropy_bwd

        return cross_entropy_bwd(grad, logits, labels)
    grad_logits = logits.to(accumulation_dtype(logits.dtype)).softmax(-1)
    known = (labels != IGNORED)[:, None]
    grad_logits.scatter_add_(1, labels.clamp(min=0)[:, None], -known.to(grad_logits.dtype))
    return (grad_logits.where(known, 0) * grad).to(logits.dtype)


@_cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _runs_on_triton(logits: Tensor) -> bool:
    vocab, most = logits.shape[1], _LARGEST_VOCABULARY
    unfit = f"the kernels take vocabularies of up to {most}, not {vocab}" if vocab > most else None
    return uses_triton(logits, unfit=unfit)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.backend = chosen_backend()
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    with use_backend(ctx.backend):
        return _cross_entropy_backward(grad, *ctx.saved_tensors), None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
_cross_entropy_backward.refuse_autograd()
