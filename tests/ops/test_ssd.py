"""The recurrence of Mamba-2 on torch, against the sequential oracle, and that against hand sums."""

import math

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import reference, ssd, ssd_continued
from h_net_dynamic_chunking.ops.ssd import why_no_kernels
from tests.ops.ssd_cases import NAMES, ssd_inputs, with_tail
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_same_function,
    assert_within_low_precision_budget,
    compiled,
    cumulative,
    randn,
)

# Starts at, before and after the edges of chunks of 4, two in one chunk, single positions.
CHUNKS_OF_4 = [[4, 4, 5], [3, 1, 1, 8], [1] * 6 + [7], [5, 2, 6], [12, 1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [*RAGGED[:-1], [63, 2, 64, 1], *CHUNKS_OF_4])
def test_oracle(lens: list[int], device: str) -> None:
    cu_seqlens = cumulative(lens, device)
    assert_same_function(
        lambda *inputs: ssd(*inputs, cu_seqlens, chunk_size=4 if sum(lens) < 20 else 64),
        lambda *inputs: reference.ssd(*inputs, cu_seqlens),
        ssd_inputs(sum(lens), device=device),
    )


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1), (3, 9), (2, 64), (1, 70)])
def test_padded_rows_are_packed_sequences(shape: tuple[int, int]) -> None:
    rows, length = shape
    cu_seqlens = cumulative([length] * rows)

    def packed(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))
        return reference.ssd(x, dt, A, B, C, D, cu_seqlens).unflatten(0, shape)

    assert_same_function(ssd, packed, ssd_inputs(*shape))


def test_the_oracle_equals_hand_sums() -> None:
    """Three tokens, two state channels: y_3 written out as the sum over what reaches it."""
    x, dt, B, C = (
        torch.tensor(numbers, dtype=torch.float64)
        for numbers in (
            [1.0, -2.0, 3.0],
            [0.5, 1.0, 2.0],
            [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
            [[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]],
        )
    )
    A, D = torch.tensor([[-1.0], [10.0]], dtype=torch.float64)
    y = reference.ssd(x.view(3, 1, 1), dt[:, None], A, B, C, D, torch.tensor([0, 3]))
    e = math.exp
    hand = [
        0.5 + 10,
        # C_2.B_1 dt_1 x_1 decayed by dt_2, C_2.B_2 dt_2 x_2, D x_2
        2 * 0.5 * e(-1) + 1 * 1 * -2 - 20,
        1 * 0.5 * e(-3) + 3 * 1 * -2 * e(-2) + 4 * 2 * 3 + 30,
    ]
    assert_close("y", y.flatten(), torch.tensor(hand, dtype=torch.float64))


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4, 5])])
def test_gradcheck_and_opcheck(cu_seqlens: Tensor | None) -> None:
    """Over two chunks and a part of a third, without and with resets."""
    positions = (1, 5) if cu_seqlens is None else (5,)
    inputs = ssd_inputs(*positions, heads=2, head_dim=2, d_state=2)
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda *args: ssd(*args, cu_seqlens, chunk_size=2), inputs)
    torch.library.opcheck(torch.ops.h_net.ssd.default, (*inputs, cu_seqlens, 2))
    plain = tuple(x.detach() for x in inputs)
    backward = (torch.ones_like(plain[0]), *plain, cu_seqlens, 2)
    torch.library.opcheck(torch.ops.h_net.ssd_backward.default, backward)
    if cu_seqlens is None:
        state = randn(1, 2, 2, 2).detach()
        torch.library.opcheck(torch.ops.h_net.ssd_continued.default, (*plain, state, 2))


def test_compiles_once_for_all_lengths() -> None:
    run, compilations = compiled(lambda *inputs: ssd(*inputs))
    for lens in ([4, 3], [19, 2], [5, 38]):
        cu_seqlens = cumulative(lens)
        assert_same_function(
            lambda *inputs, cu=cu_seqlens: run(*inputs, cu),
            lambda *inputs, cu=cu_seqlens: reference.ssd(*inputs, cu),
            [x.detach().requires_grad_() for x in ssd_inputs(sum(lens))],
        )
    assert compilations() == 1


@pytest.mark.parametrize("lens", [[3, 20], [0, 0], []])
def test_tail_is_never_read(lens: list[int]) -> None:
    """And comes out as zeros; nor is the gradient read there."""
    live, cu_seqlens = sum(lens), cumulative(lens)
    inputs = with_tail(ssd_inputs(40), live)
    y = ssd(*inputs, cu_seqlens, chunk_size=8)
    weights = torch.ones_like(y)
    weights[live:] = torch.nan
    gradients = torch.autograd.grad(y, inputs, weights)
    short = [x.detach()[:live] if i in (0, 1, 3, 4) else x for i, x in enumerate(inputs)]
    short = [x.detach().requires_grad_() for x in short]
    want = reference.ssd(*short, cu_seqlens)
    assert_close("y", y[:live], want)
    assert not y[live:].any()
    want_gradients = torch.autograd.grad(want.sum(), short) if live else [0 * x for x in short]
    for name, got, wanted in zip(NAMES, gradients, want_gradients, strict=True):
        if name in ("A", "D"):
            assert_close(name, got, wanted)
        else:
            assert_close(name, got[:live], wanted)
            assert not got[live:].any(), name


def test_strong_decay_stays_finite() -> None:
    """A decay that underflows inside one chunk gives no inf or NaN, forward or backward."""
    x, dt, A, B, C, D = (tensor.detach().float() for tensor in ssd_inputs(2, 130))
    inputs = (x, torch.full_like(dt, 50.0), 20 * A, B, C, D)
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    y = ssd(*inputs)
    for tensor in (y, *torch.autograd.grad(y.sum(), inputs)):
        assert tensor.isfinite().all()


def test_bfloat16_error_budget() -> None:
    """Values and gradients: at most twice the error of the plain recurrence run in bfloat16."""
    rounded = tuple(tensor.detach().bfloat16() for tensor in ssd_inputs(260))
    cu_seqlens, weights = cumulative([130, 130]), randn(260, 3, 4, seed=9).detach().bfloat16()
    results = []
    for op, dtype in (
        (ssd, torch.bfloat16),
        (reference.ssd, torch.bfloat16),
        (reference.ssd, torch.float64),
    ):
        leaves = tuple(tensor.to(dtype).requires_grad_() for tensor in rounded)
        y = op(*leaves, cu_seqlens)
        results.append((y, *torch.autograd.grad(y, leaves, weights.to(dtype))))
    for chunked, plain, exact in zip(*results, strict=True):
        assert chunked.dtype == torch.bfloat16
        assert_within_low_precision_budget(chunked, plain, exact)


def test_pieces_equal_the_whole() -> None:
    """Also where a piece is padded: a position with dt = 0 leaves the state alone."""
    x, dt, A, B, C, D = (tensor.detach() for tensor in ssd_inputs(2, 30))
    whole = ssd(x, dt, A, B, C, D)
    state, pieces = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for start, end in ((0, 7), (7, 7), (7, 8), (8, 30)):
        part = (slice(None), slice(start, end))
        padded = [
            torch.nn.functional.pad(t[part], (0, 0) * (t.ndim - 2) + (0, 3)) for t in (x, B, C)
        ]
        steps = torch.nn.functional.pad(dt[part], (0, 0, 0, 3))
        y, state = ssd_continued(padded[0], steps, A, *padded[1:], D, state, chunk_size=4)
        pieces.append(y[:, : end - start])
    assert_close("y", torch.cat(pieces, dim=1), whole)
    with pytest.raises(RuntimeError, match="h_net::ssd_continued has no derivative"):
        ssd_continued(x.requires_grad_(), dt, A, B, C, D, state)[0].sum().backward()


def test_why_no_kernels() -> None:
    assert why_no_kernels(64, 128) is None
    assert why_no_kernels(16, 16) is None
    assert "powers of 2" in str(why_no_kernels(8, 64))
    assert "up to 64 x 128" in str(why_no_kernels(128, 128))


def test_bad_inputs() -> None:
    x, dt, A, B, C, D = ssd_inputs(2, 3)
    with pytest.raises(ValueError, match=r"dt must have shape \(2, 3, 3\), got \(2, 2, 3\)"):
        ssd(x, dt[:, :2], A, B, C, D)
    with pytest.raises(ValueError, match="C must have shape"):
        ssd(x, dt, A, B, C[..., :-1], D)
    with pytest.raises(ValueError, match=r"C must be torch.float64, as x is, got torch.float32"):
        ssd(x, dt, A, B, C.float(), D)
    with pytest.raises(ValueError, match=r"B must have shape \(2, 3, 1\), got \(\)"):
        ssd(x, dt, A, torch.tensor(1.0), C, D)
    for name, integers in (
        ("dt", (dt.long(), A, D)),
        ("A", (dt, A.long(), D)),
        ("D", (dt, A, D.long())),
    ):
        with pytest.raises(ValueError, match=f"{name} must be floating-point, got torch.int64"):
            ssd(x, *integers[:2], B, C, integers[2])
    with pytest.raises(
        ValueError, match=r"x must be \(total, heads, head_dim\), got \(2, 3, 3, 4\)"
    ):
        ssd(x, dt, A, B, C, D, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        ssd(x[0], dt[0], A, B[0], C[0], D, torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="chunk_size must be"):
        ssd(x, dt, A, B, C, D, chunk_size=0)
    with pytest.raises(ValueError, match="state must have shape"):
        ssd_continued(x, dt, A, B, C, D, torch.zeros(2, 3, 5, 4))
