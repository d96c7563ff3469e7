"""The kernels of the Mamba-2 layer, but for its recurrence, against the torch operations."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import (
    Mamba2Parameters,
    causal_conv,
    gated_norm,
    mamba2_inner,
    use_backend,
    zero_tail,
)
from tests.ops.mamba2_cases import mamba2_inputs
from tests.ops.triton_cases import (
    DEVICE,
    LENS,
    LOW_PRECISION,
    as_the_fakes_promise,
    assert_kernels_agree,
    assert_kernels_as_exact,
    values_and_gradients,
)
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import cumulative, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


def conv_parameters(channels: int, taps: int) -> tuple[Tensor, Tensor]:
    return randn(channels, 1, taps, seed=1), randn(channels, seed=2)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_causal_conv_of_fewer_taps(taps: int) -> None:
    cu_seqlens = cumulative([3, 0, 1, 7], DEVICE)
    assert_kernels_agree(
        lambda *inputs: causal_conv(*inputs, cu_seqlens),
        randn(11, 24),
        *conv_parameters(24, taps),
    )


def test_causal_conv_of_wide_and_of_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More channels than a program has, sequences longer than it walks, and rows of a batch."""
    from h_net_dynamic_chunking.ops._triton import causal_conv as kernels

    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(kernels, name, (16, 8, 2, 1))
    assert_kernels_agree(
        lambda x, *rest: causal_conv(x.unflatten(0, (2, 19)), *rest).flatten(0, 1),
        randn(38, 20),
        *conv_parameters(20, 4),
    )


@pytest.mark.parametrize("total", [1, 11, 40])
def test_gated_norm(total: int) -> None:
    y, z, weight = randn(total, 20), randn(total, 20, seed=1), randn(20, seed=2)
    cu_seqlens = cumulative([total - 1, 1], DEVICE)
    assert_kernels_agree(lambda *inputs: gated_norm(*inputs, cu_seqlens), y, z, weight)
    assert_kernels_agree(lambda y, z, w: gated_norm(y[None], z[None], w)[0], y, z, weight)


def test_slices_and_tails_of_nan() -> None:
    wide, y, cu_seqlens = randn(12, 24), randn(12, 20, seed=3), cumulative([3, 0, 6], DEVICE)
    with torch.no_grad():
        wide[9:], y[9:] = torch.nan, torch.nan
    parameters = conv_parameters(20, 4)
    assert_kernels_agree(
        lambda x, *rest: causal_conv(x[:, 2:22], *rest, cu_seqlens), wide, *parameters
    )
    assert_kernels_agree(
        lambda y, z, w: gated_norm(y, z[:, 3:23], w, cu_seqlens), y, wide, parameters[1]
    )


@pytest.mark.parametrize("lens", [[3, 0, 6], [12], [0]])
def test_zero_tail(lens: list[int]) -> None:
    """Of more numbers than a program has, and of integers."""
    x, cu_seqlens = randn(12, 3, 700), cumulative(lens, DEVICE)
    with torch.no_grad():
        x[sum(lens) :] = torch.nan
    assert_kernels_agree(lambda x: zero_tail(x[..., 1:], cu_seqlens), x)
    with use_backend("triton"):
        whole = torch.arange(12, device=DEVICE)
        assert torch.equal(zero_tail(whole, cu_seqlens), whole * (whole < sum(lens)))


def inner(projected: Tensor, *parameters: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return mamba2_inner(projected, Mamba2Parameters(*parameters), cu_seqlens)


def kernel_inputs(total: int, heads: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    """Of the smallest sizes of the recurrence's kernels."""
    return mamba2_inputs(total, heads=heads, head_dim=16, d_state=16, taps=4, seed=seed)


@pytest.mark.parametrize("lens", LENS)
def test_mamba2(lens: list[int]) -> None:
    cu_seqlens = cumulative(lens, DEVICE)
    assert_kernels_agree(
        lambda *inputs: inner(*inputs, cu_seqlens=cu_seqlens),
        *kernel_inputs(sum(lens)),
        low_precision=sum(lens) > 20,
    )


def test_mamba2_of_padded_rows() -> None:
    assert_kernels_agree(
        lambda projected, *rest: inner(projected.unflatten(0, (2, 5)), *rest).flatten(0, 1),
        *kernel_inputs(10),
        low_precision=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("lens", LENS)
def test_mamba2_with_its_product(lens: list[int], dtype: torch.dtype) -> None:
    """As the product behind it, to the last bit; the gradient of its weight, which is of rows that
    are there again, within the rounding of those."""
    total, cu_seqlens = sum(lens) + 2, cumulative(lens, DEVICE)
    inputs = [x.to(DEVICE) for x in (*kernel_inputs(total), randn(24, 64, seed=9))]
    with torch.no_grad():
        inputs[0][total - 2 :] = torch.nan

    def fused(projected: Tensor, *rest: Tensor) -> Tensor:
        named = Mamba2Parameters(*rest[:-1])
        return mamba2_inner(projected, named, cu_seqlens, out_weight=rest[-1])

    def plain(*inputs: Tensor) -> Tensor:
        return inner(*inputs[:-1], cu_seqlens=cu_seqlens) @ inputs[-1].t()

    with as_the_fakes_promise():
        *got, got_weight = values_and_gradients("triton", fused, inputs, dtype)
    *want, want_weight = values_and_gradients("triton", plain, inputs, dtype)
    assert all(map(torch.equal, got, want))
    rounding = torch.finfo(dtype).eps * float(want_weight.abs().max())
    torch.testing.assert_close(got_weight, want_weight, rtol=0, atol=2 * rounding)


def test_gated_norm_again() -> None:
    """Where the gradient has been, within a bit; the gradients do not depend on it."""
    from h_net_dynamic_chunking.ops._triton.gated_norm import gated_norm_bwd, gated_norm_fwd

    y, z, grad = (randn(40, 20, seed=i, device=DEVICE).detach().half() for i in range(3))
    weight, cu_seqlens = randn(20, seed=3, device=DEVICE).detach(), cumulative([30, 8], DEVICE)
    results = []
    for again in (False, True):
        grad_z = torch.empty_like(z)
        gradients = gated_norm_bwd(grad, y, z, weight, 1e-5, cu_seqlens, grad_z, again)
        results.append((*gradients, grad_z))
    assert all(map(torch.equal, *results))
    want = gated_norm_fwd(y, z, weight, 1e-5, cu_seqlens)
    torch.testing.assert_close(grad, want, rtol=torch.finfo(grad.dtype).eps, atol=1e-6)
    assert not grad[38:].any()


def inner_of_whole_chunks(projected: Tensor, *parameters: Tensor) -> Tensor:
    """Rows of one chunk each, which are rows to the recurrence too."""
    return inner(projected.unflatten(0, (-1, 128)), *parameters).flatten(0, 1)


def test_mamba2_of_padded_rows_of_whole_chunks() -> None:
    assert_kernels_agree(inner_of_whole_chunks, *kernel_inputs(256, heads=1), low_precision=False)


def test_mamba2_of_padded_rows_of_whole_chunks_in_low_precision() -> None:
    """Of several draws: behind the gated norm most of a draw's error is at the few positions whose
    rows are much smaller than the others. One had 81% of its square, and gave 2.4 times torch's.
    """
    draws = [kernel_inputs(256, seed=7 * draw) for draw in range(4)]
    assert_kernels_as_exact(inner_of_whole_chunks, draws)


@pytest.mark.parametrize("lens", [[256], [128, 128], [100, 0, 90]])
def test_kept_states(lens: list[int]) -> None:
    """Those of the kernels are those of the torch path, which a GPU may go back on."""
    from h_net_dynamic_chunking.ops import mamba2

    projected, *parameters = (
        x.detach().to(DEVICE, torch.float16) for x in kernel_inputs(sum(lens) + 20, heads=1)
    )
    cu_seqlens = cumulative(lens, DEVICE)
    with use_backend("triton"):
        arguments = (None, 1e-5, cu_seqlens, 8)
        *_, convolved, got = torch.ops.h_net.mamba2_inner(projected, *parameters, *arguments)
    named = Mamba2Parameters(*parameters)
    assert got.shape == mamba2._new_states(projected, named).shape
    x, B, _ = named.sizes.split_conv(convolved)
    dt = torch.nn.functional.softplus(
        mamba2._steps(named.sizes.split(projected)[2], named.dt_bias, cu_seqlens)
    )
    want = mamba2._entering_states(x, dt, mamba2._decay_rates(named.A_log), B, cu_seqlens)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_mamba2_with_a_tail_of_nan() -> None:
    projected, *parameters = kernel_inputs(12)
    cu_seqlens = cumulative([3, 0, 6], DEVICE)
    with torch.no_grad():
        projected[9:] = torch.nan
    assert_kernels_agree(
        lambda *inputs: inner(*inputs, cu_seqlens=cu_seqlens),
        projected,
        *parameters,
        low_precision=False,
    )


def test_sizes_that_the_kernels_do_not_take() -> None:
    """By name they are refused, each part with its reason."""
    cu_seqlens, x = cumulative([4], DEVICE), randn(4, 5, device=DEVICE).float()
    with use_backend("triton"):
        with pytest.raises(ValueError, match="the kernels take up to 4 taps, not 5"):
            causal_conv(x, randn(5, 1, 5).float().to(DEVICE), x[0], cu_seqlens)
        wide = torch.ones(1, 8200, device=DEVICE)
        with pytest.raises(ValueError, match="the kernels take rows of up to 8192, not 8200"):
            gated_norm(wide, wide, wide[0], cumulative([1], DEVICE))
        inputs = [x.detach().float().to(DEVICE) for x in mamba2_inputs(4)]
        with pytest.raises(ValueError, match="powers of 2 from 16 to 128, not 3 and 4"):
            inner(*inputs, cu_seqlens=cu_seqlens)
