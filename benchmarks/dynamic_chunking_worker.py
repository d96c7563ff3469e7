"""One process of benchmarks/dynamic_chunking.py: times the chunker that its interpreter imports.

    python benchmarks/dynamic_chunking_worker.py '{"batch": 8, "length": 8192, "dim": 1024, ...}'

Prints one JSON object. Ours and the published chunker carry the same name and, for padded input,
the same interface; so each runs in a process of its own, on the same numbers.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from h_net_dynamic_chunking import DynamicSequenceChunker


def main() -> None:
    case: dict[str, Any] = json.loads(sys.argv[1])
    torch.manual_seed(0)
    batch, length, dim = case["batch"], case["length"], case["dim"]
    device, dtype = case["device"], getattr(torch, case["dtype"])
    tokens = torch.randn(batch, length, dim, device=device, dtype=dtype).requires_grad_()
    chunker = DynamicSequenceChunker(dim, boundary_threshold=threshold(tokens, case["share"]))
    if case.get("accelerated"):
        chunker = DynamicSequenceChunker(
            dim, boundary_threshold=chunker.boundary_threshold, assoc_scan_use_accelerated=True
        )
    if case.get("max_chunks"):
        chunker = DynamicSequenceChunker(
            dim, boundary_threshold=chunker.boundary_threshold, max_chunks=case["max_chunks"]
        )
    chunker = chunker.to(device, dtype)
    with torch.no_grad():
        eye = torch.eye(dim, device=device, dtype=dtype)
        chunker.to_queries_keys.weight.copy_(torch.cat((eye, eye)))
    lengths = {}
    if case.get("packed"):
        tokens = tokens.detach().flatten(0, 1).requires_grad_()
        lengths["cu_seqlens"] = torch.arange(batch + 1, device=device) * length
    grad = torch.randn_like(tokens)
    leaves = [tokens, *chunker.parameters()]

    def forward() -> tuple[Tensor, Tensor]:
        chunks, upsample, loss = chunker(tokens, **lengths)
        return upsample(chunks), loss

    def inference() -> None:
        with torch.no_grad():
            forward()

    def forward_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        out, loss = forward()
        torch.autograd.backward((out, loss), (grad, torch.ones_like(loss)))

    result = {}
    for name, function in (
        ("inference", inference),
        ("forward", forward),
        ("forward_backward", forward_backward),
    ):
        result[f"{name}_ms"] = milliseconds(function, device)
        result[f"{name}_kernels_ms"] = kernel_milliseconds(function, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        forward_backward()
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    chunks, _, _ = chunker(tokens, **lengths)
    result["chunk_slots"] = chunks.numel() // dim
    print(json.dumps(result))


def threshold(tokens: Tensor, share: float) -> float:
    """The probability that this share of the positions exceeds under identity projections."""
    x = tokens.detach()[: min(4, len(tokens))].float()
    cosine = torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    return float((0.5 - 0.5 * cosine).flatten().quantile(1 - share))


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median over rounds of back-to-back calls, which is what a training loop makes."""
    if device != "cuda":
        function()
        return 0.0
    for _ in range(5):
        function()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return statistics.median(times)


def kernel_milliseconds(function: Callable[[], object], device: str) -> float:
    """What the GPU works in one call; the rest of its time it waits for the host."""
    if device != "cuda":
        return 0.0
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 5e3


if __name__ == "__main__":
    main()
