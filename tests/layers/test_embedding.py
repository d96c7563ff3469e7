"""The embedding of a small vocabulary, as a module."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

from h_net_dynamic_chunking.layers.embedding import Embedding


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_a_sharded_weight_keeps_torchs_embedding() -> None:
    """Tensor parallelism makes it one; its gradient is one again."""
    module, ids = Embedding(6, 4), torch.tensor([[0, 5, 5]])
    want = module(ids)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate()]))
        out = module(distribute_tensor(ids, mesh, [Replicate()]))
        assert torch.equal(out.full_tensor(), want)
        out.sum().backward()
        assert module.weight.grad.full_tensor().sum() == 12
    finally:
        distributed.destroy_process_group()
