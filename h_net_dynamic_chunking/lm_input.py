"""What HNetLM takes: ids in one of three forms, and labels of the same form."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.layout import Layout, same_rows
from h_net_dynamic_chunking.lm_inference import check_integers, check_range
from h_net_dynamic_chunking.ops.cross_entropy import IGNORED


def checked_lens(
    input_ids: Tensor, mask: Tensor | None, lens: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """`lens`, or what `mask` says of them.

    Raises:
        ValueError: more than one of the three, ids of another number of dimensions than goes with
            them, or a mask of another shape or with gaps.
    """
    options = {"mask": mask, "lens": lens, "cu_seqlens": cu_seqlens}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: pass one")
    if not input_ids.is_nested and input_ids.ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(
            "input_ids must have shape (batch, length), or (total,) together with cu_seqlens, "
            f"got {tuple(input_ids.shape)}{'' if cu_seqlens is None else ' with cu_seqlens'}"
        )
    return lens if mask is None else _lens_of(mask, input_ids)


def _lens_of(mask: Tensor, input_ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != input_ids.shape or mask.ndim != 2:
        raise ValueError(
            f"mask must be bool of the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    lens = mask.sum(1)
    if mask.device.type == "cpu":
        expected = torch.arange(mask.shape[1]) < lens[:, None]
        if not torch.equal(mask, expected):
            raise ValueError("mask must be True on the left of each row and False behind")
    return lens


def checked_labels(labels: Tensor, logits: Tensor, layout: Layout, vocab_size: int) -> Tensor:
    """int64, of the leading shape of the logits' values: the labels, `IGNORED` at pads.

    Raises:
        ValueError: labels of another form than the logits, or out of range at a real position.
    """
    check_integers("labels", labels)
    if logits.is_nested != labels.is_nested or (
        labels.is_nested and not same_rows(labels, layout.cu_seqlens)
    ):
        raise ValueError("labels must have rows as long as those of input_ids")
    logits, labels = (t.values() if t.is_nested else t for t in (logits, labels))
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    labels = labels.long()
    if layout.inverse is not None:
        labels = labels.where(layout.mask, IGNORED)
    check_range("labels", labels, vocab_size, besides=IGNORED)
    return labels
