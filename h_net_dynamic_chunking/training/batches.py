"""Batches of byte windows.

The training batch of step k depends on the seed and on k alone, so a resumed run needs no state
of the data.
"""

import random
from collections.abc import Iterator

import torch
from torch import Tensor


def training_batch(content: Tensor, batch_size: int, seq_len: int, seed: int, step: int) -> Tensor:
    """Return the random windows of one step.

    content: uint8 (length,), length > seq_len
    returns: int64 (batch_size, seq_len + 1); the model reads all but the last byte and predicts
        all but the first
    """
    # A string is hashed whole, so that no two pairs (seed, step) share a stream.
    generator = random.Random(f"{seed}/{step}")
    starts = [generator.randrange(len(content) - seq_len) for _ in range(batch_size)]
    return torch.stack([content[start : start + seq_len + 1] for start in starts]).long()


def validation_batches(
    content: Tensor, batch_size: int, seq_len: int, every: int = 1
) -> Iterator[Tensor]:
    """Yield consecutive windows that predict every byte of `content` but the first exactly once.

    content: uint8 (length,)
    every: yield each `every`-th window only, a sample that is spread over the content evenly
    yields: int64 (rows, seq_len + 1), rows <= batch_size; the last may be one shorter window
    """
    windows = (len(content) - 1) // seq_len
    if windows:
        tiles = content[: windows * seq_len + 1].unfold(0, seq_len + 1, seq_len)[::every]
        for rows in torch.split(tiles, batch_size):
            yield rows.long()
    rest = content[windows * seq_len :]
    if len(rest) > 1 and (every == 1 or not windows):
        yield rest.long().unsqueeze(0)
