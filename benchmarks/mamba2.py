"""A Mamba-2 layer on a GPU in bfloat16, forward and backward, beside the layer of mamba-ssm.

    python benchmarks/mamba2.py
    python benchmarks/mamba2.py --profile --mamba-ssm DIR --fla DIR

ms are medians; the memory is what a forward and backward pass adds to weights and input, "kept"
what of it waits for the backward pass. "x of" compares with what mamba-ssm 2.3.2 and causal-conv1d
1.6.2 took for their fused layer, packed, on an H200 with torch 2.11.0+cu130. With `--mamba-ssm`
that layer runs beside ours, with our convolution in it.

The parts are timed at the sizes of width 1024. DIR is a folder that `pip install --no-deps
--target DIR` made: fla-core for `chunk_simple_gla`, which is the same recurrence without D;
mamba-ssm for its Triton kernels, for which its source is enough, without what it compiles.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from mamba_ssm_layer import fused_layer, import_mamba_ssm
from torch import Tensor

from h_net_dynamic_chunking.layers import Mamba2
from h_net_dynamic_chunking.ops import causal_conv, gated_norm, ssd

REPEATS = 15
#  width  positions  sequences   mamba-ssm: forward, forward + backward
LAYERS = [
    (512, 65536, 8, 1.50, 8.24),
    (1024, 65536, 8, 3.08, 12.01),
    (2048, 32768, 4, 4.03, 14.57),
]
COMPONENTS = {
    "products": ("nvjet", "gemm", "splitK", "cutlass"),
    "recurrence": ("ssd_",),
    "convolution": ("conv_", "sequence_ids"),
    "gated norm": ("gated_norm",),
    "steps": ("time_step",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="ms of each kind of kernel")
    parser.add_argument("--fla", metavar="DIR", help="a folder with fla-core")
    parser.add_argument("--mamba-ssm", metavar="DIR", help="a folder with mamba-ssm's source")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    forms = ["packed", "no tail", "padded"]
    if arguments.mamba_ssm:
        import_mamba_ssm(arguments.mamba_ssm)
        forms.append("mamba-ssm")
    print("width  positions  form       forward ms (x of)  + backward ms (x of)  peak GB  kept GB")
    for size in LAYERS:
        for form in forms:
            time_layer(*size, form=form, profiled=arguments.profile)
    print("part, width 1024, 65536 positions     forward ms    + backward ms")
    time_parts()
    if arguments.mamba_ssm:
        time_mamba_ssm()
    if arguments.fla:
        time_fla(arguments.fla)


def time_layer(
    width: int,
    total: int,
    batch: int,
    theirs_forward: float,
    theirs: float,
    *,
    form: str,
    profiled: bool,
) -> None:
    """`form`: packed; the same, known to have nothing behind the last sequence; padded; or packed
    by mamba-ssm."""
    layer = Mamba2(width).to("cuda", torch.bfloat16)
    length = total // batch
    shape = (batch, length, width) if form == "padded" else (total, width)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    cu_seqlens = torch.arange(batch + 1, device="cuda") * length
    lengths = () if form == "padded" else (cu_seqlens, form == "no tail")
    sequence = torch.arange(batch, device="cuda", dtype=torch.int32).repeat_interleave(length)

    def forward() -> Tensor:
        if form == "mamba-ssm":
            return fused_layer(layer, x[None], sequence[None])[0]
        out: Tensor = layer(x, *lengths)
        return out

    def both() -> None:
        torch.autograd.grad(forward(), (x, *layer.parameters()), grad)

    with torch.no_grad():
        forward_ms = milliseconds(forward)
    ms = milliseconds(both)
    peak, kept = memory(forward, both)
    print(
        f"{width:5d}  {total:9d}  {form:9s}  {forward_ms:9.3f} ({theirs_forward / forward_ms:4.2f})"
        f"    {ms:12.3f} ({theirs / ms:4.2f})     {peak:7.2f}  {kept:7.2f}",
        flush=True,
    )
    if profiled and form == "no tail":
        for name, part in profile(both).items():
            print(f"           {name:12s} {part:6.3f} ms")


def milliseconds(run: Callable[[], object]) -> float:
    """The median of a few, with a cold start before them."""
    for _ in range(3):
        run()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(REPEATS)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[REPEATS // 2]


def memory(forward: Callable[[], Tensor], both: Callable[[], None]) -> tuple[float, float]:
    """GB at the peak of both passes, and between them, over what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    out = forward()
    kept = torch.cuda.memory_allocated() - before
    del out
    return peak / 1e9, kept / 1e9


def profile(run: Callable[[], object]) -> dict[str, float]:
    """ms of the kernels, by component, most first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as prof:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    parts: dict[str, float] = defaultdict(float)
    for event in prof.key_averages():
        kinds = (k for k, names in COMPONENTS.items() if any(n in event.key for n in names))
        parts[next(kinds, "other")] += event.self_device_time_total / 3e3
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


class Parts(NamedTuple):
    """Of a layer, with gradients, at the sizes of width 1024, in slices as the kernels get them."""

    conv_in: Tensor
    weight: Tensor
    bias: Tensor
    convolved: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor
    gate: Tensor
    norm_weight: Tensor
    cu_seqlens: Tensor

    def x_B_C(self) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = torch.split(self.convolved, [2048, 128, 128], dim=1)
        return x.view(-1, 32, 64), B, C


def parts_of_a_layer(total: int = 65536) -> Parts:
    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    convolved = leaf(total, 2304)
    with torch.no_grad():
        convolved *= 0.1
    dt = torch.rand(total, 32, device="cuda").mul_(0.1).requires_grad_()
    A = (-1 - 15 * torch.rand(32, device="cuda")).requires_grad_()
    cu_seqlens = torch.arange(9, device="cuda") * (total // 8)
    return Parts(
        leaf(total, 4384)[:, 2048:4352],
        leaf(2304, 1, 4),
        leaf(2304),
        convolved,
        dt,
        A,
        leaf(32, dtype=torch.float32),
        leaf(total, 4384)[:, :2048],
        leaf(2048),
        cu_seqlens,
    )


def time_part(name: str, run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    """A line, or the reason why there is none: rivals refuse some versions of Triton."""
    line = f"{name:36s}"
    try:
        with torch.no_grad():
            line += f"{milliseconds(run):10.3f}"
        weights = torch.randn_like(run())
        line += f"{milliseconds(lambda: torch.autograd.grad(run(), inputs, weights)):14.3f}"
    except RuntimeError as error:
        line += f"    {str(error)[:90]}"
    print(line, flush=True)


def time_parts() -> None:
    p = parts_of_a_layer()
    time_part(
        "causal_conv",
        lambda: causal_conv(p.conv_in, p.weight, p.bias, p.cu_seqlens),
        (p.conv_in, p.weight, p.bias),
    )

    def recurrence() -> Tensor:
        x, B, C = p.x_B_C()
        return ssd(x, p.dt, p.A, B, C, p.D, p.cu_seqlens)

    time_part("ssd", recurrence, (p.convolved, p.dt, p.A, p.D))
    y = p.convolved[:, :2048].detach().contiguous().requires_grad_()
    time_part(
        "gated_norm",
        lambda: gated_norm(y, p.gate, p.norm_weight, p.cu_seqlens),
        (y, p.gate, p.norm_weight),
    )


def time_mamba_ssm() -> None:
    """Its Triton kernels for two of the parts."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    p = parts_of_a_layer()
    sequence = torch.arange(8, device="cuda", dtype=torch.int32).repeat_interleave(8192)[None]

    def recurrence() -> Tensor:
        x, B, C = p.x_B_C()
        rows = x[None], p.dt[None], p.A, B[None, :, None], C[None, :, None]
        out: Tensor = mamba_chunk_scan_combined(*rows, 256, D=p.D, seq_idx=sequence)
        return out

    time_part("mamba_ssm mamba_chunk_scan_combined", recurrence, (p.convolved, p.dt, p.A, p.D))
    y = p.convolved[:, :2048].detach().contiguous().requires_grad_()

    def norm() -> Tensor:
        out: Tensor = rmsnorm_fn(y, p.norm_weight, None, z=p.gate, norm_before_gate=False)
        return out

    time_part("mamba_ssm rmsnorm_fn", norm, (y, p.gate, p.norm_weight))


def time_fla(folder: str) -> None:
    sys.path.insert(0, folder)
    from fla.ops.simple_gla import chunk_simple_gla

    p = parts_of_a_layer()

    def recurrence() -> Tensor:
        x, B, C = p.x_B_C()
        k, q = (t[None, :, None].expand(-1, -1, 32, -1).contiguous() for t in (B, C))
        v, decay = (x * p.dt[..., None].to(x.dtype))[None], (p.dt * p.A)[None]
        out: Tensor = chunk_simple_gla(q, k, v, decay, scale=1.0, cu_seqlens=p.cu_seqlens)[0]
        return out

    time_part("fla chunk_simple_gla", recurrence, (p.convolved, p.dt, p.A))


if __name__ == "__main__":
    main()
