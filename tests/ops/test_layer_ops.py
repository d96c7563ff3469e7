"""The operations of the layers on torch: against their oracles, tails, gradcheck, compilation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import reference_layers as reference
from h_net_dynamic_chunking.ops.cross_entropy import IGNORED, summed_cross_entropy
from h_net_dynamic_chunking.ops.embedding import embedding, one_hot_product
from h_net_dynamic_chunking.ops.rms_norm import add_rms_norm
from h_net_dynamic_chunking.ops.rotary import rotary
from h_net_dynamic_chunking.ops.swiglu import swiglu
from tests.support import (
    DEVICES,
    RAGGED,
    assert_close,
    assert_same_function,
    assert_within_low_precision_budget,
    compiled,
    cumulative,
    generator,
    randn,
)

SHORT = [lens for lens in RAGGED if sum(lens) < 50]
DIM, HEADS, HEAD_DIM = 5, 2, 6


def weight(dim: int = DIM, device: str = "cpu") -> Tensor:
    return (1 + randn(dim, seed=7, device=device).detach() / 4).requires_grad_()


def some_labels(total: int, vocab: int, device: str = "cpu") -> Tensor:
    """Of every third position none."""
    labels = torch.randint(vocab, (total,), generator=generator())
    labels[::3] = IGNORED
    return labels.to(device)


def both(s: Tensor, out: Tensor) -> Tensor:
    """Two results as one, for comparisons of one."""
    return torch.cat((s, out.to(s.dtype)), dim=-1)


def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack((q, k, v)).flatten(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("total", [0, 1, 7])
def test_add_rms_norm(total: int, with_update: bool, device: str) -> None:
    inputs = [randn(total, DIM, device=device), weight(device=device)]
    if with_update:
        inputs.append(randn(total, DIM, seed=3, device=device))
    for part in (0, 1):
        assert_same_function(
            lambda h, w, *u, i=part: add_rms_norm(h, *(u or (None,)), w)[i],
            lambda h, w, *u, i=part: reference.add_rms_norm(h, *(u or (None,)), w)[i],
            inputs,
        )


def test_add_rms_norm_dtypes() -> None:
    """The stream is float32 whatever comes in, and each gradient has its input's dtype."""
    h, update = (randn(2, 3, DIM, seed=i).detach().bfloat16().requires_grad_() for i in (0, 1))
    for stream in (h, h.detach().float().requires_grad_()):
        s, out = add_rms_norm(stream, update, weight().bfloat16())
        assert (s.dtype, out.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(s, stream.float() + update.float())
        grads = torch.autograd.grad(s.sum() + out.sum(), (stream, update))
        assert [grad.dtype for grad in grads] == [stream.dtype, torch.bfloat16]
    s, out = add_rms_norm(h, None, weight())
    assert (s.dtype, out.dtype) == (torch.float32, torch.float64)


def test_add_rms_norm_tail_of_nan() -> None:
    cu_seqlens, h, update = cumulative([3, 1]), randn(6, DIM), randn(6, DIM, seed=1)
    with torch.no_grad():
        h[4:], update[4:] = torch.nan, torch.nan
    s, out = add_rms_norm(h, update, weight(), cu_seqlens=cu_seqlens)
    want = reference.add_rms_norm(h[:4], update[:4], weight())
    assert_close("s", s[:4], want[0])
    assert_close("out", out[:4], want[1])
    assert not s[4:].any()
    assert not out[4:].any()
    # Whatever gradient comes to the tail.
    poison = torch.ones_like(s).index_fill(0, torch.tensor([4, 5]), torch.nan)
    grads = torch.autograd.grad((s, out), (h, update), (poison, poison))
    for grad in grads:
        assert not grad[4:].any()
        assert not grad.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (7, 10)])
def test_swiglu(shape: tuple[int, int], device: str) -> None:
    assert_same_function(swiglu, reference.swiglu, [randn(*shape, device=device)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotary_dim", [0, 4, HEAD_DIM])
@pytest.mark.parametrize("lens", SHORT)
def test_rotary(lens: list[int], rotary_dim: int, device: str) -> None:
    cu_seqlens, qkv = cumulative(lens, device), randn(sum(lens), 36, device=device)
    assert_same_function(
        lambda x: joined(*rotary(x, HEADS, rotary_dim, 50.0, cu_seqlens)),
        lambda x: joined(*reference.rotary(x, HEADS, rotary_dim, 50.0, cu_seqlens)),
        [qkv],
    )


def test_rotary_of_padded_rows() -> None:
    qkv, cu_seqlens = randn(3, 4, 36), cumulative([4, 4, 4])
    for got, want in zip(
        rotary(qkv, HEADS, 4), rotary(qkv.flatten(0, 1), HEADS, 4, 10000.0, cu_seqlens), strict=True
    ):
        assert_close("turned", got.flatten(0, 1), want)


def test_rotary_tail_of_nan() -> None:
    cu_seqlens, qkv = cumulative([3, 1]), randn(6, 36)
    with torch.no_grad():
        qkv[4:] = torch.nan
    parts = rotary(qkv, HEADS, 4, 10000.0, cu_seqlens)
    assert not any(part[4:].any() for part in parts)
    poison = torch.ones_like(parts[0]).index_fill(0, torch.tensor([4, 5]), torch.nan)
    (grad,) = torch.autograd.grad(parts, qkv, [poison] * 3)
    assert not grad[4:].any()
    assert not grad.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 11)])
def test_cross_entropy(shape: tuple[int, int], device: str) -> None:
    labels = some_labels(*shape, device=device)
    assert_same_function(
        lambda x: summed_cross_entropy(x, labels),
        lambda x: reference.cross_entropy(x, labels),
        [randn(*shape, device=device)],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 4)])
def test_embedding(shape: tuple[int, ...], device: str) -> None:
    """Rows that nobody takes, and rows that are taken more than once."""
    ids = torch.randint(6, shape, generator=generator()).to(device)
    assert_same_function(
        lambda w: embedding(w, ids), lambda w: w[ids], [randn(9, DIM, device=device)]
    )
    grad = randn(ids.numel(), DIM, seed=1, device=device).detach()
    want = torch.zeros(9, DIM, dtype=grad.dtype, device=device).index_add(0, ids.flatten(), grad)
    assert_close("product", one_hot_product(grad, ids.flatten(), 9), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_embedding_in_half_precision_repeats() -> None:
    """Every bit of the gradient, and as near to float64 as torch's own."""
    ids, grad = torch.randint(256, (5000,)).cuda(), torch.randn(5000, 256).cuda()
    weight = torch.zeros(256, 256, device="cuda", requires_grad=True)

    def gradient(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        return torch.autograd.grad(function(weight.to(dtype), ids), weight, grad.to(dtype))[0]

    first, second = (gradient(embedding, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, second)
    plain = gradient(lambda w, i: w[i], torch.bfloat16)
    exact = gradient(lambda w, i: w.double()[i], torch.bfloat16)
    assert_within_low_precision_budget(first, plain, exact)


def test_gradcheck_and_opcheck() -> None:
    cu_seqlens, labels, ops = cumulative([2, 0, 1]), some_labels(4, 5), torch.ops.h_net
    h, update, logits, w = randn(4, DIM), randn(4, DIM, seed=1), randn(4, 5, seed=2), weight()
    x, qkv = randn(4, 6), randn(4, 12)
    for function, inputs in (
        (lambda h, u, w: add_rms_norm(h, u, w, cu_seqlens=cu_seqlens), (h, update, w)),
        (lambda h, w: add_rms_norm(h, None, w), (h, w)),
        (lambda h, w: add_rms_norm(h, None, w), (h[0].detach().requires_grad_(), w)),
        (swiglu, (x,)),
        (lambda x: rotary(x, 2, 2, 10.0, cu_seqlens), (qkv,)),
        (lambda x: summed_cross_entropy(x, labels), (logits,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
    grad, grads = randn(4, DIM, seed=4).detach(), randn(3, 4, 2, 2).detach()
    dtypes = torch.float64, torch.bfloat16
    for op, inputs in (
        (ops.add_rms_norm, (h, update, w, 1e-5, cu_seqlens)),
        (ops.add_rms_norm, (h, None, w, 1e-5, None)),
        (ops.add_rms_norm_backward, (grad, grad, h.detach(), w.detach(), 1e-5, None, *dtypes)),
        (ops.embedding, (h, labels.clamp(0, 3))),
        (ops.embedding_backward, (grad, labels.clamp(0, 3), 5)),
        (ops.swiglu, (x,)),
        (ops.swiglu_backward, (x.detach()[:, :3], x.detach())),
        (ops.rotary, (qkv, 2, 2, 10.0, cu_seqlens)),
        (ops.rotary_backward, (*grads, randn(4, 2, 1).detach(), cu_seqlens)),
        (ops.cross_entropy, (logits, labels)),
        (ops.cross_entropy_backward, (w.detach().sum(), logits.detach(), labels)),
    ):
        torch.library.opcheck(op.default, inputs)


def test_results_are_contiguous_whatever_comes_in() -> None:
    """As the fakes say, by which compiled code is laid out."""
    x, cu_seqlens = randn(6, 7).detach().t(), cumulative([3, 2])
    ops, dtypes = torch.ops.h_net, (torch.float64, torch.bfloat16)
    w, labels, cube = weight(6), some_labels(7, 6), randn(2, 3, 7).detach().permute(2, 1, 0)
    for op, inputs in (
        (ops.add_rms_norm, (x, x + 1, w.detach(), 1e-5, cu_seqlens)),
        (ops.add_rms_norm_backward, (x, x, x + 1, w.detach(), 1e-5, cu_seqlens, *dtypes)),
        (ops.swiglu, (x,)),
        (ops.swiglu_backward, (x[:, :3], x)),
        (ops.rotary, (x, 1, 2, 10.0, cu_seqlens)),
        (ops.rotary_backward, (cube, cube, cube, randn(7, 2, 1).detach(), cu_seqlens)),
        (ops.cross_entropy_backward, (w.detach().sum(), x, labels)),
        (ops.embedding, (x, labels.clamp(min=0))),
        (ops.embedding_backward, (x, labels.clamp(min=0), 6)),
        (ops.zero_tail, (cube, cu_seqlens)),
    ):
        torch.library.opcheck(op.default, inputs, test_utils="test_faketensor")


def test_compile() -> None:
    """Whole graph, once for all lengths."""

    def everything(x: Tensor, w: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
        s, out = add_rms_norm(x, x.sin(), w, cu_seqlens=cu_seqlens)
        q, k, v = rotary(swiglu(torch.cat((s, out), dim=-1)), 2, 2, 10.0, cu_seqlens)
        return summed_cross_entropy((q * k + v).flatten(1), labels)

    run, compilations = compiled(everything)
    graphs: set[int] = set()
    for lens in ([3, 2], [4, 9], [1, 6]):
        total = sum(lens) + 1
        inputs = randn(total, 12), weight(12)
        rest = some_labels(total, 4), cumulative(lens)
        assert_same_function(
            lambda x, w, r=rest: run(x, w, *r), lambda x, w, r=rest: everything(x, w, *r), inputs
        )
        graphs.add(compilations())
    assert len(graphs) == 1


ROWS = torch.zeros(4, 6)
BYTES = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_rms_norm(ROWS, None, torch.ones(1)), r"weight must have shape \(6,\)"),
        (lambda: add_rms_norm(ROWS, ROWS[:1], torch.ones(6)), r"update must have the shape of h"),
        (lambda: add_rms_norm(ROWS.int(), None, torch.ones(6)), "h must be a floating-point"),
        (lambda: add_rms_norm(ROWS[None], None, torch.ones(6), 1e-5, BYTES), "h must be"),
        (lambda: add_rms_norm(ROWS, None, torch.ones(6), 1e-5, [0, 4]), "cu_seqlens must be a te"),
        (lambda: swiglu(ROWS[:, :5]), "x must have an even last dimension"),
        (lambda: swiglu(BYTES), "x must be a floating-point"),
        (lambda: swiglu(torch.tensor(1.0)), "x must be a floating-point"),
        (lambda: rotary(ROWS, 1, 2), "qkv must be a floating-point tensor of shape"),
        (lambda: rotary(ROWS[None], 1, 2, 1e4, BYTES), "qkv must be a floating-point"),
        (lambda: rotary(ROWS[None], 4, 2), "heads must divide a third of qkv's width 6, got 4"),
        (lambda: rotary(ROWS[None], 0, 2), "heads must divide"),
        (lambda: rotary(ROWS[None], 1, 1), r"rotary_dim must be even and in 0 \.\. 2, got 1"),
        (lambda: rotary(ROWS[None], 1, 4), "rotary_dim must be even"),
        (lambda: summed_cross_entropy(ROWS[0], BYTES), "logits must be"),
        (lambda: summed_cross_entropy(ROWS, BYTES.int()), r"labels must be int64 of shape \(4,\)"),
        (lambda: summed_cross_entropy(ROWS, BYTES[:3]), "labels must be int64"),
        (lambda: embedding(ROWS, ROWS), "ids must be int32 or int64, got torch.float32"),
        (lambda: embedding(ROWS[0], BYTES), r"weight must have shape \(vocab, dim\)"),
    ],
)
def test_off_the_contract(call: Callable[[], object], message: str) -> None:
    """What torch would broadcast, and a kernel would read past its end."""
    with pytest.raises(ValueError, match=message):
        call()
