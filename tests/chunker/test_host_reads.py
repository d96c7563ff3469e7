"""How often a forward pass stops the host to read from the GPU: once a stage, never when capped."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from h_net_dynamic_chunking import DynamicSequenceChunker, HNet
from h_net_dynamic_chunking.layers import Isotropic
from h_net_dynamic_chunking.ops import begin_segment
from tests.support import cumulative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def host_reads(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Synchronising operations, and waits for an event, in one call; a first call before that
    loads what is loaded lazily."""
    function()
    waits = []
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda event: waits.append(synchronize(event))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.undo()
    return len(waits) + sum(
        "called a synchronizing CUDA operation" in str(w.message) for w in caught
    )


@pytest.mark.parametrize(("max_chunks", "reads"), [(None, 1), (8, 0)])
def test_chunker(max_chunks: int | None, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunker = DynamicSequenceChunker(16, max_chunks=max_chunks, handle_residual_proj=True).cuda()
    x = torch.randn(3, 50, 16, device="cuda")

    def forward(**lengths: Any) -> torch.Tensor:
        chunks, upsample, _ = chunker(x, **lengths)
        return upsample(chunks)

    assert host_reads(forward, monkeypatch) == reads
    lens = torch.tensor([50, 0, 7], device="cuda")
    # Packing reads the total once more, unless the shapes are static.
    assert host_reads(lambda: forward(lens=lens), monkeypatch) == 2 * reads


def test_each_read_gets_its_own_number() -> None:
    """Several on the way at once, into memory of earlier ones, in and out of inference mode."""
    cu_seqlens = cumulative([40, 24], "cuda")
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            masks = [torch.arange(64, device="cuda") % n == 0 for n in (1, 2, 4)]
            pending = [begin_segment(mask, cu_seqlens) for mask in masks]
            found = [one.finish() for one in reversed(pending)]
            assert [len(one.boundary_positions) for one in found] == [16, 32, 64]
            assert [one.most_chunks for one in found] == [10, 20, 40]
            assert [len(one.finish().boundary_positions) for one in pending] == [64, 32, 16]


@pytest.mark.parametrize(("max_chunks", "reads"), [(None, 3), (8, 0)])
def test_three_stages(max_chunks: int | None, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net: nn.Module = nn.Identity()
    for _ in range(3):
        net = HNet(nn.Linear(16, 16), net, nn.Linear(16, 16), 16, max_chunks=max_chunks)
    net, x = net.cuda(), torch.randn(3, 50, 16, device="cuda")
    assert host_reads(lambda: net(x), monkeypatch) == reads


@pytest.mark.parametrize(("max_chunks", "reads"), [(None, 1), (8, 0)])
def test_attention_on_packed_chunks(
    max_chunks: int | None, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Isotropic("t2", 16, attention={"num_heads": 2})
    net = HNet(nn.Linear(16, 16), network, nn.Linear(16, 16), 16, max_chunks=max_chunks)
    net, x = net.cuda().bfloat16(), torch.randn(70, 16, device="cuda").bfloat16()
    cu_seqlens = torch.tensor([0, 50, 50, 70], device="cuda")
    assert host_reads(lambda: net(x, cu_seqlens=cu_seqlens), monkeypatch) == reads
