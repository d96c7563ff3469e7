"""Compiles every kernel, as its launcher would launch it, for an H100; needs no GPU.

The interpreter runs a kernel as Python, where a name may change its type and nothing is checked
before it runs. The launchers are called on CPU tensors with `launch` replaced.

    python -m tests.ops.compile_kernels
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from h_net_dynamic_chunking.ops import segment
from h_net_dynamic_chunking.ops._triton import (
    boundary,
    causal_conv,
    cross_entropy,
    dechunk_backward,
    dechunk_forward,
    gated_norm,
    gather,
    partial_sums,
    places,
    ratio,
    rms_norm,
    rotary,
    segmentation,
    sequence_ids,
    ssd_backward,
    ssd_chunks,
    ssd_forward,
    ssd_states,
    swiglu,
    tail,
    time_step,
)

MODULES = (
    boundary,
    causal_conv,
    cross_entropy,
    dechunk_backward,
    dechunk_forward,
    gated_norm,
    gather,
    partial_sums,
    places,
    ratio,
    rms_norm,
    rotary,
    segmentation,
    sequence_ids,
    ssd_backward,
    ssd_chunks,
    ssd_forward,
    ssd_states,
    swiglu,
    tail,
    time_step,
)

_TYPES = {
    torch.bool: "*i1",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def main() -> None:
    compiled: list[str] = []

    def launch(
        kernel: Any, programs: Any, arguments: dict[str, Any], constants: Any, num_warps: int
    ) -> None:
        assert [*arguments, *constants] == kernel.arg_names
        signature = {name: _type(value) for name, value in arguments.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        target = GPUTarget("cuda", 90, 32)
        # As launches find them, which Triton compiles differently.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, value in enumerate(arguments.values())
            if isinstance(value, Tensor)
        }
        source = ASTSource(kernel, signature, constants, aligned)
        triton.compile(
            source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True}
        )
        compiled.append(kernel.__name__)

    for module in MODULES:
        module.launch = launch
    call_launchers()
    print(len(set(compiled)), "kernels")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def call_launchers() -> None:
    """Once each, in bfloat16, with every option that adds code."""
    total, dim = 100, 300
    cu_seqlens, mask = torch.tensor([0, 40, total]), torch.rand(total) < 0.5
    x, pairs = torch.randn(total, dim).bfloat16(), torch.randn(total, 2 * dim).bfloat16()
    p, s = torch.rand(total), segment(mask, cu_seqlens)
    z = torch.randn(len(s.boundary_positions), dim).bfloat16()
    boundary.boundary_fwd(pairs, cu_seqlens)
    boundary.boundary_bwd(p, pairs, cu_seqlens)
    segmentation.segment(mask, cu_seqlens, None)
    segmentation.segment(mask, cu_seqlens.int(), 7)
    for count in (None, s.cu_chunks):
        gather.gather(x, s.boundary_positions, count)
    ratio.ratio_loss_fwd(mask, p, cu_seqlens, 6.0)
    ratio.ratio_loss_bwd(p.sum(), p.sum(), p, cu_seqlens)
    walked = s.chunk_of_position, s.boundary_positions
    places.padded_places(cu_seqlens, 60, total)
    # A residual as it comes, and as its projection makes it, with a bias of either dtype.
    for short_memory, residual, bias in (
        (False, x, torch.randn(dim)),
        (True, x.float(), torch.randn(dim)),
        (True, x.float(), torch.randn(dim).bfloat16()),
    ):
        dechunk_forward.dechunk_fwd(
            z,
            p,
            *walked,
            s.starts,
            residual,
            bias,
            x.dtype,
            weigh_input=True,
            clamp=None,
            keep_smoothed=True,
            short_memory=short_memory,
        )
    dechunk_forward.expand_fwd(z, *walked, None, x.dtype)
    for straight_through in (False, True):
        dechunk_backward.dechunk_bwd(
            x,
            z,
            z,
            p,
            s.chunk_of_position,
            s.starts,
            s.cu_chunks,
            weigh_input=True,
            clamp=None,
            straight_through=straight_through,
        )
    dechunk_backward.expand_bwd(x, z, s.chunk_of_position)
    call_layers(x, cu_seqlens)
    call_ssd()
    call_mamba2_parts()


def call_layers(x: Tensor, cu_seqlens: Tensor) -> None:
    """Those of the operations of the layers."""
    dtype, h, w, labels = x.dtype, x.float(), x[0].clone(), torch.zeros(len(x), dtype=torch.int64)
    rms_norm.add_rms_norm_fwd(h, x, w, 1e-5, cu_seqlens)
    rms_norm.add_rms_norm_bwd(h, x, h, w, 1e-5, cu_seqlens, torch.float32, dtype)
    swiglu.swiglu_fwd(x)
    swiglu.swiglu_bwd(x[:, :150], x)
    q, k, v, cos_sin = rotary.rotary_fwd(x, 4, 12, 10000.0, cu_seqlens)
    rotary.rotary_bwd(q, k, v, cos_sin, cu_seqlens)
    cross_entropy.cross_entropy_fwd(x, labels)
    cross_entropy.cross_entropy_bwd(h[0, 0], x, labels)


def call_ssd() -> None:
    """Packed with its gradients, and one row of padding that goes on from a state."""
    total, heads, P, N = 300, 2, 64, 128
    x, B, C = torch.randn(total, heads * P + 2 * N).bfloat16().split([heads * P, N, N], 1)
    x = x.unflatten(1, (heads, P))
    dt, A, D = torch.rand(total, heads), -torch.ones(heads), torch.ones(heads)
    y, entering = ssd_forward.ssd_fwd(x, dt, A, B, C, D, torch.tensor([0, 40, total]))
    ssd_backward.ssd_bwd(
        y,
        x,
        dt,
        A,
        B,
        C,
        D,
        torch.tensor([0, 40, total]),
        entering,
        grad_x=y,
        grad_dt=dt,
        grad_B=B,
        grad_C=C,
    )
    state = torch.zeros(1, heads, N, P)
    ssd_forward.ssd_fwd(x, dt, A, B, C, D, None, initial=state, final=state)


def call_mamba2_parts() -> None:
    """With slices as inputs and as places for gradients."""
    total, dim, heads = 100, 300, 6
    projected, cu_seqlens = torch.randn(total, 2 * dim + heads).bfloat16(), torch.tensor([0, total])
    z, x, raw = projected.split([dim, dim, heads], 1)
    weight, bias = torch.randn(dim, 1, 4).bfloat16(), torch.randn(dim)
    ids = sequence_ids.sequence_ids(cu_seqlens, total)
    out = causal_conv.conv_fwd(x, weight, bias, *ids)
    causal_conv.conv_bwd(out, x, weight, bias, *ids, x)
    gated_norm.gated_norm_fwd(out, z, bias, 1e-5, cu_seqlens)
    gated_norm.gated_norm_bwd(out, out, z, bias, 1e-5, cu_seqlens, z)
    tail.zero_tail(out, cu_seqlens)
    dt = time_step.time_step_fwd(raw, bias[:heads], cu_seqlens)
    time_step.time_step_bwd(dt, raw, bias[:heads], cu_seqlens, raw)


if __name__ == "__main__":
    main()
