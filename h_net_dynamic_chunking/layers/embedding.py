"""The embedding of a small vocabulary, such as that of bytes."""

from torch import Tensor, nn

from h_net_dynamic_chunking.ops.embedding import embedding
from h_net_dynamic_chunking.ops.registration import PLAIN


class Embedding(nn.Embedding):
    """torch's, with the gradient of `ops.embedding`; jagged and sharded tensors keep torch's.

    ids:  int64, any shape
    out:  (*shape of ids, dim), dtype of `weight`

    >>> import torch
    >>> Embedding(256, 8)(torch.tensor([[65, 66]])).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__(vocab, dim)

    def forward(self, ids: Tensor) -> Tensor:
        plain = type(self.weight) in PLAIN and type(ids) in PLAIN and not ids.is_nested
        # What nested and sharded tensors are, torch knows and an operation of ours does not.
        return embedding(self.weight, ids) if plain else super().forward(ids)
