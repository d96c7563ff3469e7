"""Compiles every kernel, as its launcher would launch it, for an H100; needs no GPU.

The interpreter runs a kernel as Python, where a name may change its type and nothing is checked
before it runs. The launchers are called on CPU tensors with `launch` replaced, and, for the kernels
of a step, what `kernel[programs]` calls.

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
    append,
    attention_step,
    boundary,
    causal_conv,
    choose_step,
    conv_step,
    cross_entropy,
    dechunk_backward,
    dechunk_forward,
    dechunk_step,
    embed_step,
    gated_norm,
    gather,
    keep_step,
    linear_step,
    partial_sums,
    places,
    product_step,
    ratio,
    rms_norm,
    rotary,
    route_step,
    rows_step,
    segmentation,
    sequence_ids,
    ssd_backward,
    ssd_chunks,
    ssd_forward,
    ssd_keys,
    ssd_pairs,
    ssd_states,
    state_step,
    swiglu,
    tail,
    time_step,
    wide_product,
)

MODULES = (
    append,
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
    ssd_keys,
    ssd_pairs,
    ssd_states,
    swiglu,
    tail,
    time_step,
    wide_product,
)

_STEPS = (
    attention_step,
    choose_step,
    conv_step,
    dechunk_step,
    embed_step,
    linear_step,
    product_step,
    route_step,
    rows_step,
    state_step,
)

_TYPES = {
    torch.bool: "*i1",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}


def main() -> None:
    compiled: list[str] = []

    def launch(
        kernel: Any, programs: Any, arguments: dict[str, Any], constants: Any, num_warps: int
    ) -> None:
        assert [*arguments, *constants] == kernel.arg_names
        compile_one(kernel, arguments, constants, {"num_warps": num_warps})

    def run(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> None:
        values = {name: given.pop(name) for name in kernel.arg_names}
        constants = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr}
        compile_one(kernel, values, constants, given)

    def compile_one(
        kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        signature = {name: _type(value) for name, value in arguments.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name] for name in kernel.arg_names}
        target = GPUTarget("cuda", 90, 32)
        # As launches find them, which Triton compiles differently.
        aligned = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        }
        source = ASTSource(kernel, signature, constants, aligned)
        triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
        compiled.append(kernel.__name__)

    for module in MODULES:
        module.launch = launch
    call_launchers()
    triton.runtime.JITFunction.run = run
    for module in _STEPS:
        module.launch_options = lambda _, begins=False: {
            "INTERPRETED": False,
            "OVERLAP": True,
            "launch_pdl": True,
        }
    call_step_launchers()
    print(len(set(compiled)), "kernels")


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_type, value))
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
    segmentation.segment(mask, cu_seqlens, None, None)
    segmentation.segment(p, cu_seqlens.int(), 7, 0.5)
    for count in (None, s.cu_chunks):
        gather.gather(x, s.boundary_positions, count)
    ratio.ratio_loss_fwd(mask, p, cu_seqlens, 6.0, 0.03)
    for others in (None, p):
        ratio.ratio_loss_bwd(p.sum(), p.sum(), p.sum(), p, cu_seqlens, 0.03, others)
    walked = s.chunk_of_position, s.boundary_positions
    places.padded_places(cu_seqlens, 60, total)
    places.places_of_chunks(s.cu_chunks, s.boundary_positions, s.cu_chunks, total)
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
    for dtype, straight_through, short_memory in (
        (x.dtype, False, False),
        (x.dtype, True, False),
        (x.dtype, True, True),
        (torch.float16, True, True),
        (torch.float32, True, True),
    ):
        dechunk_backward.dechunk_bwd(
            x.to(dtype),
            z.to(dtype),
            z,
            p,
            s.chunk_of_position,
            s.starts,
            s.cu_chunks,
            weigh_input=True,
            clamp=None,
            straight_through=straight_through,
            short_memory=short_memory,
        )
    dechunk_backward.expand_bwd(x, z, s.chunk_of_position)
    for parts in (1, 3):
        wide_product.wide_product(x, [pairs.view(-1, dim)] * parts, torch.randn(2 * total))
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
    swiglu.swiglu_bwd(x[:, :150].contiguous(), x, again=True)
    q, k, v, cos_sin = rotary.rotary_fwd(x, 4, 12, 10000.0, cu_seqlens)
    rotary.rotary_bwd(q, k, v, cos_sin, cu_seqlens)
    first, lens, rows = cu_seqlens[:2], cu_seqlens[1:], x.unflatten(0, (2, -1))
    q, k, v, _ = rotary.rotary_fwd(rows, 4, 12, 10000.0, None, first, lens)
    append.append(q, k, torch.cat((k, k), 1), torch.cat((v, v), 1), first, lens, True)
    cross_entropy.cross_entropy_fwd(x, labels)
    cross_entropy.cross_entropy_bwd(h[0, 0], x, labels)


def call_ssd() -> None:
    """Packed with its gradients, and one row of padding that goes on from a state."""
    total, heads, P, N = 300, 2, 64, 128
    x, B, C = torch.randn(total, heads * P + 2 * N).bfloat16().split([heads * P, N, N], 1)
    x = x.unflatten(1, (heads, P))
    dt, A, D = torch.rand(total, heads), -torch.ones(heads), torch.ones(heads)
    y, states = ssd_forward.ssd_fwd(x, dt, A, B, C, D, torch.tensor([0, 40, total]))
    ssd_backward.ssd_bwd(
        y,
        x,
        dt,
        A,
        B,
        C,
        D,
        torch.tensor([0, 40, total]),
        states,
        grad_x=y,
        grad_dt=dt,
        grad_B=B,
        grad_C=C,
    )
    state = torch.zeros(1, heads, P, N)
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
    gated_norm.gated_norm_bwd(out.clone(), out, z, bias, 1e-5, cu_seqlens, z, again=True)
    tail.zero_tail(out, cu_seqlens)
    dt = time_step.time_step_fwd(raw, bias[:heads], cu_seqlens)
    time_step.time_step_bwd(dt, raw, bias[:heads], cu_seqlens, raw)
    rows, lens = x.unflatten(0, (2, -1)), torch.tensor([40, 3])
    causal_conv.conv_continued(rows, weight, bias, torch.zeros(2, dim, 3).bfloat16(), lens)
    time_step.time_step_fwd(raw, bias[:heads], None, lens)
    gated_norm.gated_norm_fwd(out, z, bias, 1e-5, None)


def call_step_launchers() -> None:
    """Once each, in bfloat16, on several rows where there may be, a third of which rests."""
    rows, dim, heads, head_dim, d_state = 5, 64, 2, 24, 40

    def bf16(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16()

    flags, wide = torch.arange(rows) % 3 > 0, torch.randn(rows, dim)
    channels = heads * head_dim + 2 * d_state
    convolution = conv_step.Convolution(
        bf16(rows, channels, 3), bf16(channels, 4), bf16(channels), torch.empty(rows, channels), 8
    )
    alone = convolution._replace(window=bf16(1, channels, 3), out=torch.empty(1, channels))
    conv_step.conv_step(bf16(rows, channels + 8), convolution, flags)
    weight, norm = bf16(channels + 8, dim), bf16(dim)
    one = wide[:1]
    linear_step.linear_step(
        one, weight, norm_weight=norm, convolution=alone, active=flags[:1], gate=one
    )
    linear_step.linear_step(one, bf16(2 * dim, dim), swiglu=True, residual=one)
    x = bf16(rows, dim)
    product_step.product_step(x, weight, split=True, active=flags)
    product_step.product_step(x, weight, swiglu=True, active=flags)
    product_step.product_step(x, torch.randn(dim, dim), bias=bf16(dim), out_dtype=torch.float32)
    state = torch.randn(rows, heads, head_dim, d_state)
    per_head = {name: bf16(heads) for name in ("dt_bias", "A_log", "D")}
    squares = torch.empty(rows, state_step.parts(state))
    gated = state_step.Gated(
        bf16(rows, heads * head_dim), bf16(heads * head_dim), mean_square=squares
    )
    for kept in (state, state.bfloat16()):
        state_step.state_step(
            convolution.out,
            bf16(rows, heads),
            kept,
            **per_head,
            out_dtype=torch.bfloat16,
            active=flags,
            gated=gated,
        )
    parts = torch.randn(3, rows, dim)
    position = torch.arange(rows)
    count = [position, position]
    rows_step.norm_rows(wide, norm, add=parts, mean_square=squares, active=flags, count=count)
    rows_step.norm_rows(x, norm, keep=wide, active=flags, begins=True)
    rows_step.swiglu_rows(x)
    embed_step.embed_step(x, position)
    for batch, window in ((rows, -1), (1, 3000)):
        caches = [bf16(batch, 4000, heads, head_dim) for _ in range(2)]
        attention_step.attention_step(
            bf16(batch, 3 * heads * head_dim),
            *caches,
            position[:batch],
            rotary_dim=8,
            ring=window > 0,
            window_size=window,
            active=flags[:batch],
        )
    probs, opens, chunks = torch.rand(rows), ~flags, torch.ones(rows, dtype=torch.int64)
    route_step.route_step(bf16(rows, 2 * dim), x, chunks, chunks, 0.5, flags, opens)
    dechunk_step.dechunk_step(x, wide, probs, opens, wide, torch.bfloat16)
    for go_in, around in ((True, None), (True, []), (True, [flags, flags]), (False, [flags])):
        keep = keep_step.Keep(x, x, probs, flags, go_in, around)
        route_step.route_step(bf16(rows, 2 * dim), x, chunks, chunks, 0.5, flags, keep=keep)
    choose_step.choose_step(
        bf16(rows, 256),
        torch.rand(rows, 9),
        torch.ones(rows, 1),
        flags,
        chunks,
        flags.clone(),
        flags.clone(),
        torch.zeros(rows, 1, dtype=torch.int64),
        torch.zeros(rows, 9, dtype=torch.int16),
        torch.zeros(rows, 9),
        eos=255,
        reads_last=False,
        no_distribution=-2,
    )


if __name__ == "__main__":
    main()
