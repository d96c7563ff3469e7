"""One process of benchmarks/chunker.py: times whichever package its interpreter imports."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from h_net_dynamic_chunking import DynamicSequenceChunker

REPEATS, WARM_UP = 7, 2


def main() -> None:
    torch.manual_seed(0)
    chunker = DynamicSequenceChunker(512)
    tokens = torch.randn(3, 1024, 512).requires_grad_()

    def forward(tokens: Tensor = tokens) -> tuple[Tensor, Tensor]:
        downsampled, upsample, aux_loss = chunker(tokens)
        return upsample(downsampled), aux_loss

    def forward_backward(tokens: Tensor = tokens) -> None:
        output, aux_loss = forward(tokens)
        (output.sum() + aux_loss).backward()

    # A small call first, so that what libraries load at first use is not counted as memory of the
    # case; then the case, before it has warmed the allocator.
    forward_backward(torch.randn(1, 8, 512).requires_grad_())
    peak = peak_megabytes(forward_backward)
    print(
        json.dumps(
            {
                "peak_mb": peak,
                "forward_ms": milliseconds(forward),
                "forward_backward_ms": milliseconds(forward_backward),
                "products_ms": milliseconds(lambda: products(tokens)),
            }
        )
    )


def products(tokens: Tensor) -> None:
    """The projection to queries and keys, and its two gradients: what both sides must do."""
    weight = torch.randn(1024, 512, requires_grad=True)
    projected = torch.nn.functional.linear(tokens, weight)
    projected.backward(torch.empty_like(projected))


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[WARM_UP:])


def peak_megabytes(function: Callable[[], object]) -> float:
    """How far resident memory rises above where it stands; Linux only."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lets the high-water mark start anew
    function()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> float:
    """A field of /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
