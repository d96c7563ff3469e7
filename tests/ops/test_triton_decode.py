"""The Triton kernels of a decoding step beside plain torch: the layers' own step, or its formula.

On a GPU they are compiled; without one they are interpreted (see conftest.py), on small shapes.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from h_net_dynamic_chunking.layers import CausalAttention, Mamba2, SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm
from h_net_dynamic_chunking.ops import (
    boundary_probability_step,
    ema_smooth_step,
    expand_step,
)
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import assert_close, assert_within_low_precision_budget, boundaries, generator

# The interpreter of Triton 3.6 takes arrays of one element for numbers, which numpy 2.4 refuses.
pytest.importorskip("triton", None if torch.cuda.is_available() else "3.7")

from h_net_dynamic_chunking.ops._triton.attention_step import attention_step
from h_net_dynamic_chunking.ops._triton.conv_step import Convolution, conv_step
from h_net_dynamic_chunking.ops._triton.dechunk_step import dechunk_step
from h_net_dynamic_chunking.ops._triton.embed_step import embed_step
from h_net_dynamic_chunking.ops._triton.keep_step import Keep
from h_net_dynamic_chunking.ops._triton.linear_step import linear_step
from h_net_dynamic_chunking.ops._triton.product_step import Cut, product_step
from h_net_dynamic_chunking.ops._triton.route_step import route_step
from h_net_dynamic_chunking.ops._triton.rows_step import norm_rows, swiglu_rows
from h_net_dynamic_chunking.ops._triton.state_step import Gated, parts, state_step

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(rows, dtype) for rows in (1, 3, 17, 64) for dtype in DTYPES]
if DEVICE == "cpu":  # slow: every number of rows and every dtype, but not every pair
    SIZES = [(1, DTYPES[1]), (3, DTYPES[0]), (17, DTYPES[2]), (64, DTYPES[1])]
LINEARS = [(64, 48), (131, 37), (5000, 9), *([(700, 2100)] if DEVICE == "cuda" else [])]
by_size = pytest.mark.parametrize(("rows", "dtype"), SIZES)


def by_shape_and_size(names: str, *shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """All shapes in all sizes; interpreted, only the first in all, and the others on few rows."""
    cases = [
        (*shape, *size)
        for shape in shapes
        for size in (SIZES if DEVICE == "cuda" or shape == shapes[0] else SIZES[:2])
    ]
    return pytest.mark.parametrize(f"{names},rows,dtype", cases)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)


def parameters(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (numbers(*shape, seed=seed) / shape[-1] ** 0.5).to(dtype)


def some_active(rows: int) -> Tensor:
    """Two of three rows, the first among them."""
    return (torch.arange(rows) % 3 != 1).to(DEVICE)


def assert_agrees(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """In float32 the table's tolerance, in less at most twice the error of plain torch."""
    assert got.dtype == plain.dtype
    if got.dtype == torch.float32:
        assert_close(name, got, exact.float())
    else:
        assert_within_low_precision_budget(got, plain, exact)


def in_both(function: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, Tensor]:
    """`function` of the inputs in their dtypes, and of all of them in float64."""

    def widened(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return copy.deepcopy(value).double()
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    with torch.no_grad():
        return function(*inputs), function(*(widened(value) for value in inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), LINEARS)
def test_linear(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """One row, with and without a bias, into a view of a wider tensor, and in another dtype."""
    x, weight = numbers(1, inputs, dtype=dtype), parameters(outputs, inputs, seed=1, dtype=dtype)
    bias = numbers(outputs, seed=2, dtype=dtype)
    assert_agrees("product", linear_step(x, weight), *in_both(F.linear, x, weight))

    wide = numbers(1, outputs + 3, dtype=dtype)
    margin = wide[:, outputs:].clone()
    got = linear_step(x, weight, bias=bias, out=wide[:, :outputs])
    assert got.data_ptr() == wide.data_ptr()
    assert_agrees("with bias", got, *in_both(F.linear, x, weight, bias))
    assert torch.equal(wide[:, outputs:], margin)

    got = linear_step(x, weight, out_dtype=torch.float32)
    assert_close("in float32", got, F.linear(x.double(), weight.double()).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 75])
def test_linear_after_gate_and_norm(dtype: torch.dtype, width: int) -> None:
    """As Mamba-2 goes back to the residual stream, whose float32 is added to in place."""
    norm, weight = RMSNorm(width).to(DEVICE, dtype), parameters(40, width, seed=1, dtype=dtype)
    norm.weight.data += 0.1 * numbers(width, seed=2, dtype=dtype)
    y, projected = numbers(1, width, seed=3, dtype=dtype), numbers(1, 200, seed=4).to(dtype)
    gate, residual = projected[:, :width], numbers(1, 40, seed=5)

    def plain(y: Tensor, gate: Tensor, norm: RMSNorm, weight: Tensor, h: Tensor) -> Tensor:
        return h + F.linear(norm(y * F.silu(gate)), weight)

    want = in_both(plain, y, gate, norm, weight, residual)
    h = residual.clone()
    got = linear_step(y, weight, gate=gate, norm_weight=norm.weight, residual=h)
    assert got.data_ptr() == h.data_ptr()
    if dtype == torch.float32:
        assert_close("stream", got, want[1].float())
    else:
        assert_within_low_precision_budget(got, *want)
    elsewhere, out = residual.to(dtype), torch.empty_like(residual)
    got = linear_step(y, weight, residual=elsewhere, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_close("out", got, elsewhere.float() + linear_step(y, weight, out_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    """The MLP of a layer with its norm, on the float32 residual stream; one row, then several."""
    torch.manual_seed(0)
    norm, mlp = RMSNorm(72).to(DEVICE, dtype), SwiGLU(72, 128).to(DEVICE, dtype)
    h = 3 * numbers(5, 72)
    plain, want = in_both(lambda h, norm, mlp: mlp(norm(h)), h, norm, mlp)
    hidden = linear_step(h[:1], mlp.fc1.weight, norm_weight=norm.weight, swiglu=True)
    assert_agrees("one", linear_step(hidden, mlp.fc2.weight), plain[:1], want[:1])
    product = F.linear(norm_rows(h, norm.weight), mlp.fc1.weight)
    assert_agrees("several", F.linear(swiglu_rows(product), mlp.fc2.weight), plain, want)


@by_size
@pytest.mark.parametrize("width", [64, 75])
def test_norm_of_rows(rows: int, dtype: torch.dtype, width: int) -> None:
    """Of the stream with what is added to it, which may still lack a scale."""
    norm = RMSNorm(width).to(DEVICE, dtype)
    norm.weight.data += 0.1 * numbers(width, seed=2, dtype=dtype)
    h, added = numbers(rows, width, seed=3), numbers(rows, width, seed=4, dtype=dtype)
    want = in_both(lambda h, added, norm: norm(h + added), h, added, norm)
    stream = h.clone()
    assert_agrees("sum", norm_rows(stream, norm.weight, add=added), *want)
    assert_close("stream", stream, h + added)

    kept = torch.zeros_like(stream)
    active = some_active(rows)
    count = [torch.arange(rows, device=DEVICE), torch.zeros_like(active, dtype=torch.int64)]
    got = norm_rows(added, norm.weight, keep=kept, active=active, count=count)
    assert_close("of some", got, norm(added).where(active[:, None], 0), 2 * torch.finfo(dtype).eps)
    assert torch.equal(kept, added.float().where(active[:, None], 0))
    assert torch.equal(count[0], torch.arange(rows, device=DEVICE) + active)
    assert torch.equal(count[1], active.long())

    squares = numbers(rows, 5, seed=5).square()

    def scaled(h: Tensor, added: Tensor, squares: Tensor, norm: RMSNorm) -> Tensor:
        return norm(h + added * (squares.sum(1, keepdim=True) + 1e-5).rsqrt())

    got = norm_rows(h.clone(), norm.weight, add=added, mean_square=squares)
    assert_agrees("scaled", got, *in_both(scaled, h, added, squares, norm))


@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_product_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Whole, split over its inputs and added up by the norm behind it, and as a SwiGLU."""
    inputs, outputs, splits = 312, 40, 3
    wide = numbers(rows, inputs + 8, dtype=dtype)
    x, weight = wide[:, :inputs], parameters(outputs, inputs, seed=1, dtype=dtype)
    whole = Cut(outputs=16, inputs=64, splits=1, stages=2, warps=4)
    plain, want = in_both(F.linear, x, weight)
    assert_agrees("whole", product_step(x, weight, cut=whole), plain, want)
    parts = product_step(x, weight, split=True, cut=whole._replace(splits=splits))
    assert parts.shape == (splits, rows, outputs)
    assert_agrees("parts", parts.sum(0), plain.float(), want)
    # A row does not depend on how many others there are.
    alone = product_step(x[1:2], weight, split=True, cut=whole._replace(splits=splits))
    if rows <= 16:
        assert torch.equal(alone[:, 0], parts[:, 1])

    active, bias = some_active(rows), numbers(outputs, seed=2, dtype=dtype)
    rest = torch.where(active[:, None], x, torch.nan)
    plain_sum, want_sum = in_both(F.linear, x.where(active[:, None], 0), weight, bias)
    got = product_step(rest, weight, bias=bias, active=active, out_dtype=torch.float32, cut=whole)
    assert_agrees("with bias, of some", got, plain_sum.float(), want_sum)

    stream, norm = numbers(rows, outputs, seed=3), RMSNorm(outputs).to(DEVICE, dtype)
    added = in_both(lambda h, p, n: n(h + p), stream, plain, norm)
    assert_agrees("norm", norm_rows(stream.clone(), norm.weight, add=parts), *added)

    def swiglu(x: Tensor, weight: Tensor) -> Tensor:
        value, gate = F.linear(x, weight).chunk(2, 1)
        return value * F.silu(gate)

    assert_agrees("SwiGLU", product_step(x, weight, swiglu=True), *in_both(swiglu, x, weight))


def test_product_of_a_float32_weight() -> None:
    """At most twice as far off as float32 is, summed over 2048 inputs."""
    x, weight = (
        numbers(3, 2048, dtype=torch.bfloat16),
        parameters(20, 2048, seed=1, dtype=DTYPES[0]),
    )
    got = product_step(x, weight, out_dtype=torch.float32)
    want = F.linear(x.double(), weight.double())
    assert_close("product", got, want.float())
    error, of_torch = ((y - want).abs().max() for y in (got, F.linear(x.float(), weight)))
    assert error <= 2 * of_torch + 1e-7


def test_product_refuses() -> None:
    x, weight = numbers(2, 16, dtype=DTYPES[1]), numbers(6, 16, dtype=DTYPES[1])
    for arguments, message in (
        ({"x": numbers(65, 16, dtype=DTYPES[1])}, "x must have 1 to 64 rows, got 65"),
        ({"x": x.float()}, "or weight float32 beside bfloat16, got torch.float32"),
        ({"x": x[:, :12], "weight": weight[:, :12].contiguous()}, "must be multiples of 8, got 12"),
        ({"weight": weight[:5], "swiglu": True}, r"weight must have shape \(2 \* out, in\)"),
        ({"cut": Cut(16, 64, 2, 2, 4)}, "cut must not split the inputs"),
        ({"bias": numbers(6), "split": True}, "bias must be None"),
        ({"bias": numbers(5)}, "bias must have shape"),
        ({"active": numbers(2)}, "active must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            product_step(**{"x": x, "weight": weight, **arguments})


def test_linear_refuses() -> None:
    x, weight = numbers(1, 8), numbers(6, 8)
    for arguments, message in (
        ({"x": numbers(2, 8)}, r"x must have shape \(1, 8\), got \(2, 8\)"),
        ({"x": numbers(1, 9)}, r"x must have shape \(1, 8\), got \(1, 9\)"),
        ({"weight": numbers(8, 6).T}, "weight must have stride 1"),
        ({"weight": numbers(5, 8), "swiglu": True}, r"weight must have shape \(2 \* out, in\)"),
        ({"weight": weight.double()}, "weight must be float32, bfloat16 or float16"),
        ({"gate": numbers(1, 7)}, "gate must have shape"),
        ({"bias": numbers(3)}, "bias must have shape"),
        ({"norm_weight": numbers(6)}, "norm_weight must have shape"),
        ({"residual": numbers(1, 6).bfloat16()}, "residual must be torch.float32"),
        ({"residual": numbers(1, 6), "out_dtype": torch.half}, "out_dtype must be None"),
        ({"out": numbers(1, 5)}, "out must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_step(**{"x": x, "weight": weight, **arguments})


def test_rows_refuse() -> None:
    h, weight = numbers(2, 8), numbers(8)
    for arguments, message in (
        ({"norm_weight": numbers(7)}, "norm_weight must have shape"),
        ({"mean_square": numbers(3, 7)}, "mean_square must have shape"),
        ({"add": numbers(3, 8)}, "add must have shape"),
        ({"x": h.bfloat16(), "add": h}, "x must be torch.float32"),
        ({"count": [h[:, 0].long(), h[:, 0]]}, "count must"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_rows(**{"x": h, "norm_weight": weight, **arguments})
    with pytest.raises(ValueError, match=r"product must be contiguous \(rows, 2 \* width\)"):
        swiglu_rows(numbers(2, 7))


@by_shape_and_size("d_state,head_dim,d_conv", (5, 4, 4), (16, 16, 2), (136, 12, 1))
def test_mamba(rows: int, dtype: torch.dtype, d_state: int, head_dim: int, d_conv: int) -> None:
    """Three positions of the whole mixer; the rows that rest keep their caches to the bit."""
    torch.manual_seed(0)
    d_model = 2 * head_dim
    mixer = Mamba2(d_model, d_state=d_state, head_dim=head_dim, d_conv=d_conv).to(DEVICE, dtype)
    exact = copy.deepcopy(mixer).double()
    x = numbers(rows, 4, d_model, dtype=dtype)
    caches = [mixer.allocate_inference_cache(rows, 4) for _ in range(2)]
    exact_cache = exact.allocate_inference_cache(rows, 4)

    def step(x: Tensor, active: Tensor | None = None) -> Tensor:
        return mamba_mixer_step(mixer, x, caches[0], active)

    for position in range(3):
        step(x[:, position])
        plain = mixer.step(x[:, position], caches[1])
        want = exact.step(x[:, position].double(), exact_cache)
    # The states after all, and the output of the last position.
    for name in ("conv", "state"):
        now, plain, want = (getattr(c, name) for c in (*caches, exact_cache))
        if dtype == torch.float32:
            assert_close(name, now, want.float())
        elif now.numel():
            assert_within_low_precision_budget(now, plain, want)

    active, before = some_active(rows), copy.deepcopy(caches[0])
    last = torch.where(active[:, None], x[:, 3], torch.nan)
    got = step(last, active)
    plain, want = mixer.step(x[:, 3], caches[1]), exact.step(x[:, 3].double(), exact_cache)
    assert_agrees("output", got[active], plain[active], want[active])
    for name in ("conv", "state"):
        now, then = getattr(caches[0], name), getattr(before, name)
        assert torch.equal(now[~active], then[~active]), name
        assert not torch.equal(now[active], then[active]) or now.numel() == 0, name


@by_size
@pytest.mark.parametrize("state_dtype", DTYPES[1:])
def test_states_of_16_bits(rows: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """The output of the state before it is rounded; the state to the nearest; rest to the bit."""
    heads, head_dim, d_state = 2, 12, 72
    before = numbers(rows, heads, head_dim, d_state, dtype=state_dtype)
    conv_out, dt = numbers(rows, heads * head_dim + 2 * d_state, seed=1), numbers(rows, heads)
    per_head = {name: numbers(heads, seed=2, dtype=dtype) for name in ("dt_bias", "A_log", "D")}
    active, state = some_active(rows), before.clone()
    y = state_step(conv_out, dt, state, **per_head, out_dtype=torch.float32, active=active)

    dt_bias, A_log, D = (value.double()[:, None] for value in per_head.values())
    x, B, C = conv_out.double().split([heads * head_dim, d_state, d_state], dim=1)
    x, B, C = x.view(rows, heads, head_dim), B[:, None, None], C[:, None, None]
    step = F.softplus(dt.double()[..., None] + dt_bias)
    decay = (-step * A_log.exp()).exp()[..., None]
    exact = decay * before.double() + (step * x)[..., None] * B
    want = ((exact * C).sum(-1) + D * x).flatten(1)
    assert_close("output", y[active], want[active].float())
    # Half a unit in the last place; below the normal numbers of float16 that is a constant.
    limits = torch.finfo(state_dtype)
    half_a_unit = limits.eps / 2 * exact.abs().clamp(min=limits.smallest_normal)
    assert bool(((state.double() - exact).abs() <= half_a_unit + 1e-6)[active].all())
    assert torch.equal(state[~active], before[~active])
    with pytest.raises(ValueError, match="state must be float32, bfloat16 or float16, got "):
        state_step(conv_out, dt, state.double(), **per_head, out_dtype=torch.float32)


@torch.no_grad()
def mamba_mixer_step(mixer: Mamba2, x: Tensor, cache: Any, active: Tensor | None) -> Tensor:
    """The kernels between the two projections of the mixer; for one row, the first too is ours."""
    out = torch.full(cache.conv.shape[:2], torch.nan, device=DEVICE)
    conv1d = mixer.conv1d
    convolution = Convolution(cache.conv, conv1d.weight, conv1d.bias, out, mixer.d_inner)
    weight = mixer.in_proj.weight
    if len(x) == 1:
        projected = linear_step(x, weight, convolution=convolution, active=active)
    else:
        projected = mixer.in_proj(x)
        conv_step(projected, convolution, active)
    gate, parts_of_row = projected[:, : mixer.d_inner], parts(cache.state)
    squares = torch.full((len(x), parts_of_row), torch.nan, device=DEVICE)
    gated = None if len(x) == 1 else Gated(gate, mixer.norm.weight, squares)
    y = state_step(
        out,
        projected[:, -mixer.num_heads :],
        cache.state,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        out_dtype=x.dtype,
        active=active,
        gated=gated,
    )
    if gated is None:
        return mixer._gated(y.unflatten(-1, (-1, mixer.head_dim)), gate)
    scale = (squares.sum(1, keepdim=True) + 1e-5).rsqrt()
    return (F.linear(y.float(), mixer.out_proj.weight.float()) * scale).to(x.dtype)


@torch.no_grad()
@by_shape_and_size(
    "head_dim,rotary_dim,window_size,max_seqlen",
    (96, 48, -1, 40),
    (24, 10, 36, 40),
    (8, 0, 5, 20),
    (16, 16, -1, 130),
    (16, 8, 131, 140),
)
def test_attention(
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    rotary_dim: int,
    window_size: int,
    max_seqlen: int,
) -> None:
    """Rows at positions of their own, from the first to the last slot and round the ring."""
    torch.manual_seed(0)
    mixer = CausalAttention(2 * head_dim, 2, rotary_dim=rotary_dim, window_size=window_size).to(
        DEVICE, dtype
    )
    exact = copy.deepcopy(mixer).double()
    cache = mixer.allocate_inference_cache(rows, max_seqlen)
    slots = cache.keys.shape[1]
    last = 3 * slots if cache.ring else slots - 1
    cache.position.copy_(torch.linspace(last, 0, rows).long())
    cache.positions.bound = last
    for seed, tensor in enumerate((cache.keys, cache.values)):
        tensor.copy_(numbers(*tensor.shape, seed=seed + 5, dtype=dtype))
    x = numbers(rows, 2 * head_dim, dtype=dtype)
    active = some_active(rows)

    caches = [copy.deepcopy(cache) for _ in range(2)]
    exact_cache = copy.deepcopy(cache)
    exact_cache.keys, exact_cache.values = cache.keys.double(), cache.values.double()
    qkv = mixer.Wqkv(x)
    mixed = attention_step(
        torch.where(active[:, None], qkv, torch.nan),
        caches[0].keys,
        caches[0].values,
        caches[0].position,
        rotary_dim=rotary_dim,
        ring=cache.ring,
        window_size=window_size,
        active=active,
    )
    got = mixer.out_proj(mixed)
    plain, want = mixer.step(x, caches[1]), exact.step(x.double(), exact_cache)
    assert_agrees("output", got[active], plain[active], want[active])
    assert torch.equal(caches[0].position, cache.position)
    for name in ("keys", "values"):
        now, then = getattr(caches[0], name), getattr(cache, name)
        assert torch.equal(now[~active], then[~active]), name
        assert_agrees(
            name,
            now[active],
            getattr(caches[1], name)[active],
            getattr(exact_cache, name)[active],
        )


@pytest.mark.parametrize("slots", [40, 2048])
def test_row_alone_at_rest_is_zero(slots: int) -> None:
    """Unlike one of several: the product behind it reads it as it is. In one split, and in two."""
    nobody, position = torch.tensor([False], device=DEVICE), torch.tensor([20], device=DEVICE)
    caches = [numbers(1, slots, 2, 8, seed=seed) for seed in (1, 2)]
    qkv = numbers(1, 48).fill_(torch.nan)
    assert not attention_step(qkv, *caches, position, rotary_dim=8, ring=False, active=nobody).any()
    heads = {name: numbers(2, seed=4) for name in ("dt_bias", "A_log", "D")}
    state, moved = numbers(1, 2, 12, 16, seed=3), numbers(1, 56).fill_(torch.nan)
    y = state_step(moved, moved[:, :2], state, **heads, out_dtype=torch.bfloat16, active=nobody)
    assert not y.any()


def test_attention_in_a_window_of_a_long_cache() -> None:
    """Without a ring the window is a matter of the mask; what lies outside may hold anything."""
    rows, slots, head_dim = 3, 200, 16
    keys, values = (numbers(rows, slots, 2, head_dim, seed=seed) for seed in (1, 2))
    position = torch.tensor([0, 7, 180], device=DEVICE)
    qkv = numbers(rows, 3 * 2 * head_dim)
    q, new_key, new_value = qkv.view(rows, 3, 2, head_dim).unbind(1)
    want = []
    for row, t in enumerate(position.tolist()):
        first = max(0, t - 5)
        k = torch.cat([keys[row, first:t], new_key[row, None]])
        v = torch.cat([values[row, first:t], new_value[row, None]])
        weights = torch.einsum("hd,shd->hs", q[row], k).div(head_dim**0.5).softmax(-1)
        want.append(torch.einsum("hs,shd->hd", weights, v).flatten())
        for tensor in (keys, values):
            tensor[row, :first] = torch.nan
            tensor[row, t:] = torch.nan
    got = attention_step(qkv, keys, values, position, rotary_dim=0, ring=False, window_size=5)
    assert_close("window", got, torch.stack(want))


def test_attention_rows_are_independent() -> None:
    """A row has the same bits among few as among many, which are at other positions."""
    keys, values = (numbers(5, 150, 2, 24, seed=seed) for seed in (1, 2))
    qkv, position = numbers(5, 144), torch.tensor([100, 3, 149, 0, 60], device=DEVICE)

    def run(rows: int) -> Tensor:
        caches = keys[:rows].clone(), values[:rows].clone()
        return attention_step(qkv[:rows], *caches, position[:rows], rotary_dim=8, ring=False)

    assert torch.equal(run(5)[:2], run(2))


def test_full_attention_cache_is_not_written() -> None:
    """A row past the last slot writes nowhere; the layer has refused it before, where it can."""
    keys, values = (numbers(2, 4, 1, 8, seed=seed) for seed in (1, 2))
    before = keys.clone(), values.clone()
    position = torch.tensor([4, 9], device=DEVICE)
    attention_step(numbers(2, 24), keys, values, position, rotary_dim=0, ring=False)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@by_size
@pytest.mark.parametrize("dim", [64, 37])
def test_route(rows: int, dtype: torch.dtype, dim: int) -> None:
    """p, the boundaries and the keys; the first rows, and those that rest."""
    queries_keys = numbers(rows, 2 * dim + 3, dtype=dtype)[:, : 2 * dim]
    previous = numbers(rows, dim, seed=1, dtype=dtype)
    is_first, active = boundaries(rows, device=DEVICE), some_active(rows)
    chunks = 5 * (~is_first).long()
    q, k = queries_keys.chunk(2, dim=1)
    want = boundary_probability_step(q, previous, is_first)
    queries_keys = torch.where(active[:, None], queries_keys, torch.nan)
    key = previous.clone()
    counted, seen = chunks.clone(), 3 * chunks
    p, boundary = route_step(queries_keys, key, counted, seen, 0.5, active)
    assert torch.equal(counted, chunks + boundary)
    assert torch.equal(seen, 3 * chunks + active)
    assert p.dtype == torch.float32
    assert_close("p", p[active], want[active])
    assert torch.equal(boundary[active], p[active] > 0.5)
    assert not boundary[~active].any()
    assert not p[~active].any()
    assert torch.equal(key, torch.where(active[:, None], k, previous))
    given = boundaries(rows, seed=1, device=DEVICE)
    _, boundary = route_step(queries_keys, key, chunks, seen, 0.5, active, given)
    assert torch.equal(boundary, (given | is_first) & active)


def test_route_at_the_edges() -> None:
    """Zero vectors tie at 0.5, which is no boundary; the same and the opposite key; a NaN."""
    q = torch.tensor([[0.0, 0], [3, 0], [3, 0], [3, 0], [torch.nan, 1], [3, 4]], device=DEVICE)
    previous = torch.tensor([[1.0, 2], [0, 0], [5, 0], [-2, 0], [1, 1], [0, 0]], device=DEVICE)
    chunks = torch.tensor([1] * 5 + [0], device=DEVICE)
    seen = 9 * chunks
    p, boundary = route_step(torch.cat([q, q], 1), previous, chunks, seen, 0.5)
    assert p.tolist()[:4] == [0.5, 0.5, 0.0, 1.0]
    assert p[4].isnan()
    assert p[5] == 1
    assert boundary.tolist() == [False, False, False, True, False, True]
    assert torch.equal(previous.nan_to_num(), q.nan_to_num())
    assert seen.tolist() == [10] * 5 + [1]


@pytest.mark.parametrize("go_in", [False, True])
@pytest.mark.parametrize("stages_around", [None, 0, 2])
def test_route_and_keep(go_in: bool, stages_around: int | None) -> None:
    """Rows that are active are kept, and wait where they open a chunk; the others stay.

    Those that wait may go in. Of the innermost stage these are back, and what leaves it leaves the
    stages around.
    """
    flags = torch.tensor([[a, o, w] for a in (0, 1) for o in (0, 1) for w in (0, 1)]).bool()
    active, given, waits = flags.to(DEVICE).T.contiguous()
    queries_keys, previous = numbers(8, 12), numbers(8, 6, seed=1)
    encoded, kept = (numbers(8, 37, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    kept_probs = numbers(8, seed=4)
    chunks = torch.ones(8, dtype=torch.int64, device=DEVICE)
    inputs = queries_keys, previous, chunks, chunks
    probs, opens = route_step(*(x.clone() for x in inputs), 0.5, active, given)
    assert opens.any()
    want = encoded.where(active[:, None], kept), probs.where(active, kept_probs)
    waiting = waits | opens
    encoded[~active], queries_keys[~active] = torch.nan, torch.nan
    around, was_around = None, []
    if stages_around is not None:
        around = [boundaries(8, seed=s, device=DEVICE) for s in range(stages_around)]
        was_around = [outer.clone() for outer in around]
    keep = Keep(encoded, kept, kept_probs, waits, go_in, around)
    moved = [x.clone() for x in inputs[1:]]
    leaves, inward = route_step(queries_keys, *moved, 0.5, active, given, keep)
    assert torch.equal(moved[1], chunks + opens)
    assert torch.equal(moved[2], chunks + active)
    assert torch.equal(kept, want[0])
    assert torch.equal(kept_probs, want[1])
    nobody = torch.zeros_like(waiting)
    assert torch.equal(inward, waiting if go_in else nobody)
    assert torch.equal(waits, nobody if go_in else waiting)
    back = inward if around is not None else nobody
    assert torch.equal(leaves, active & ~waiting | back)
    inner = leaves
    for outer, was in zip(around or [], was_around, strict=True):
        assert torch.equal(outer, was | inner)
        inner = outer


def test_keep_refuses() -> None:
    x, probs, flags = numbers(2, 8), numbers(2), torch.ones(2, dtype=torch.bool, device=DEVICE)
    chunks, keep = flags.long(), Keep(x, x, probs, flags, True, None)
    for wrong, active, message in (
        ({"waits": probs}, flags, r"waits must be torch\.bool"),
        ({"kept_encoded": x[:, :7]}, flags, "kept_encoded must have shape"),
        ({"kept_probs": probs.double()}, flags, r"kept_probs must be torch\.float32"),
        ({"around": [probs]}, flags, r"around must be torch\.bool"),
        ({}, None, "active must be given with keep"),
    ):
        with pytest.raises(ValueError, match=message):
            route_step(
                x, x[:, :4].clone(), chunks, chunks, 0.5, active, keep=keep._replace(**wrong)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype: torch.dtype) -> None:
    """Rows of the table, and NaN for a number that it has not."""
    weight = numbers(9, 37, dtype=dtype)
    ids = torch.tensor([0, 8, 3, 3, 9, -1], device=DEVICE)
    got = embed_step(weight, ids)
    assert torch.equal(got[:4], weight[ids[:4]])
    assert got[4:].isnan().all()
    for wrong, message in (
        ({"ids": ids[None]}, r"must be \(vocab, dim\) and \(rows,\)"),
        ({"ids": ids.int()}, r"ids must be torch\.int64"),
        ({"weight": weight.T}, "weight must"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_step(**{"weight": weight, "ids": ids} | wrong)


@by_size
@pytest.mark.parametrize(("dim", "clamp", "weigh_input"), [(64, None, True), (37, 0.1, False)])
def test_dechunk(
    rows: int, dtype: torch.dtype, dim: int, clamp: float | None, weigh_input: bool
) -> None:
    """Rows of a boundary move on; the others repeat their vector whatever z holds there."""
    z = numbers(rows, dim + 5, dtype=dtype)
    smoothed, residual = numbers(rows, dim, seed=1), numbers(rows, dim, seed=2)
    p = torch.rand(rows, generator=generator(3)).to(DEVICE)
    opens = boundaries(rows, device=DEVICE)
    gates = p if clamp is None else p.clamp(clamp, 1 - clamp)
    moved = ema_smooth_step(z[:, :dim], gates, smoothed, weigh_input=weigh_input)
    want = torch.where(opens[:, None], moved, smoothed)
    z = torch.where(opens[:, None], z, torch.nan)
    for added in (residual, None):
        state = smoothed.clone()
        got = dechunk_step(z, state, p, opens, added, dtype, clamp, weigh_input)
        assert_close("state", state, want)
        assert torch.equal(state[~opens], smoothed[~opens])
        total = expand_step(state, added)
        assert got.dtype == dtype
        assert_close("out", got, total.to(dtype), torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("step", "name", "wrong", "message"),
    [
        ("conv", "x", (2, 23), "first must be in 0 .. -1, for 24 channels of 23 outputs, got 0"),
        ("conv", "window", (2, 24, 2), "conv must have shape"),
        ("conv", "weight", (23, 4), "conv_weight must have shape"),
        ("conv", "out", (2, 23), "conv_out must have shape"),
        ("state", "conv_out", (2, 23), "conv_out must have shape"),
        ("state", "dt", (2, 3), "dt must have shape"),
        ("state", "state", (2, 16, 4), "state must be"),
        ("state", "dt_bias", (3,), "dt_bias must have shape"),
        ("state", "active", (2,), "active must be torch.bool"),
        ("attention", "qkv", (2, 47), "qkv must have shape"),
        ("attention", "values", (2, 5, 2, 7), "values must have shape"),
        ("attention", "position", (2,), "position must be torch.int64"),
        ("route", "queries_keys", (2, 7), "queries_keys must have shape"),
        ("route", "chunks", (2,), "chunks must be torch.int64"),
        ("route", "seen", (3,), "seen must have shape"),
        ("dechunk", "z", (2, 3), r"z must be \(2, 4 or more\)"),
        ("dechunk", "boundary", (2,), "boundary must be torch.bool"),
        ("dechunk", "residual", (2, 5), "residual must have shape"),
    ],
)
def test_refusals(step: str, name: str, wrong: tuple[int, ...], message: str) -> None:
    """What does not fit is named, and nothing has changed."""
    two = torch.ones(2, dtype=torch.bool, device=DEVICE)
    function, arguments = {
        "conv": (
            lambda x, **parts: conv_step(x, Convolution(**parts, first=0)),
            {
                "x": numbers(2, 42),
                "window": numbers(2, 24, 3),
                "weight": numbers(24, 4),
                "bias": numbers(24),
                "out": numbers(2, 24),
            },
        ),
        "state": (
            state_step,
            {
                "conv_out": numbers(2, 24),
                "dt": numbers(2, 2),
                "state": numbers(2, 2, 8, 4),
                "dt_bias": numbers(2),
                "A_log": numbers(2),
                "D": numbers(2),
                "out_dtype": torch.float32,
            },
        ),
        "attention": (
            attention_step,
            {
                "qkv": numbers(2, 48),
                "keys": numbers(2, 5, 2, 8),
                "values": numbers(2, 5, 2, 8),
                "position": torch.zeros(2, dtype=torch.int64, device=DEVICE),
                "rotary_dim": 4,
                "ring": False,
            },
        ),
        "route": (
            route_step,
            {
                "queries_keys": numbers(2, 8),
                "previous_key": numbers(2, 4),
                "chunks": torch.ones(2, dtype=torch.int64, device=DEVICE),
                "seen": torch.ones(2, dtype=torch.int64, device=DEVICE),
                "threshold": 0.5,
            },
        ),
        "dechunk": (
            dechunk_step,
            {
                "z": numbers(2, 6),
                "smoothed": numbers(2, 4),
                "p": numbers(2),
                "boundary": two,
                "residual": numbers(2, 4),
                "out_dtype": torch.float32,
            },
        ),
    }[step]
    arguments = {**arguments, name: numbers(*wrong)}
    before = copy.deepcopy(arguments)
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[key]), key
