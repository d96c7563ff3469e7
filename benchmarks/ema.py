"""Smoothing beside assoc-scan, on a CPU: forward + backward of s_k = P_k z_k + (1 - P_k) s_{k-1}.

python benchmarks/ema.py
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import ema_smooth

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script
    from assoc_scan import AssocScan

SHAPES = [(1550, 512), (8192, 256), (100_000, 256)]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, ms")
    print(f"{'chunks x dim':>16}{'ours':>10}{'assoc-scan':>12}{'ratio':>8}")
    scan = AssocScan()
    for chunks, dim in SHAPES:
        z = torch.randn(chunks, dim, requires_grad=True)
        p = (0.5 + 0.5 * torch.rand(chunks)).requires_grad_()
        cu_chunks = torch.tensor([0, chunks])
        ours = milliseconds(lambda: ema_smooth(z, p, cu_chunks).chunks, (z, p))  # noqa: B023
        theirs = milliseconds(lambda: scan(1 - p[None], (p[:, None] * z)[None]), (z, p))  # noqa: B023
        print(f"{f'{chunks} x {dim}':>16}{ours:10.1f}{theirs:12.1f}{theirs / ours:8.1f}")


def milliseconds(function: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Median time of forward and backward."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.autograd.grad(function().sum(), inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


if __name__ == "__main__":
    main()
