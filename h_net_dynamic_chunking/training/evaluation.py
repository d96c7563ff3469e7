"""Bits per byte of a model, and of gzip to compare it with."""

import gzip
from typing import NamedTuple

import torch
from torch import Tensor

from h_net_dynamic_chunking.training.batches import validation_batches
from h_net_dynamic_chunking.training.model import ByteHNet


class Evaluation(NamedTuple):
    """What a model makes of some bytes it was not trained on."""

    bpb: float
    bytes_per_chunk: list[float]  # stages from the outside in


@torch.no_grad()
def evaluate(
    model: ByteHNet, content: Tensor, batch_size: int, seq_len: int, every: int = 1
) -> Evaluation:
    """Predict the bytes of `content`, uint8 (length,), from the bytes before them in their window.

    every: read each `every`-th window only
    """
    device = next(model.parameters()).device
    bits, predicted, read = 0.0, 0, 0
    chunks = [0] * model.stages
    model.eval()
    for windows in validation_batches(content, batch_size, seq_len, every):
        targets = windows[:, 1:].to(device)
        prediction = model(windows[:, :-1].to(device))
        bits += prediction.bits_per_byte(targets).item() * targets.numel()
        predicted += targets.numel()
        for stage, count in enumerate(prediction.chunk_counts):
            chunks[stage] += int(count)
        read += windows[:, :-1].numel()
    model.train()
    return Evaluation(bits / predicted, [read / count for count in chunks])


def gzip_bpb(content: Tensor) -> float:
    """Bits per byte that `gzip -9` needs for `content`, uint8 (length,)."""
    packed = gzip.compress(bytes(content.tolist()), compresslevel=9, mtime=0)
    return 8 * len(packed) / len(content)
