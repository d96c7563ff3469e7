"""The embedding of a small vocabulary, such as that of bytes."""

from torch import Tensor, nn

from h_net_dynamic_chunking.ops.embedding import embedding


class Embedding(nn.Embedding):
    """torch's, with the gradient of `ops.embedding`; a jagged tensor keeps torch's.

    ids:  int64, any shape
    out:  (*shape of ids, dim), dtype of `weight`

    >>> import torch
    >>> Embedding(256, 8)(torch.tensor([[65, 66]])).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__(vocab, dim)

    def forward(self, ids: Tensor) -> Tensor:
        # Of nested tensors torch knows the shape, and an operation of ours does not.
        return super().forward(ids) if ids.is_nested else embedding(self.weight, ids)
