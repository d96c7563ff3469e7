"""The kernels of the layers' operations against the torch operations."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import use_backend
from h_net_dynamic_chunking.ops.cross_entropy import summed_cross_entropy
from h_net_dynamic_chunking.ops.rms_norm import add_rms_norm
from h_net_dynamic_chunking.ops.rotary import rotary
from h_net_dynamic_chunking.ops.swiglu import swiglu
from h_net_dynamic_chunking.ops.swiglu_linear import _swiglu_linear
from tests.ops.test_layer_ops import both, joined, some_labels, weight
from tests.ops.triton_cases import DEVICE, assert_kernels_agree
from tests.ops.triton_cases import poisoned_memory as poisoned_memory
from tests.support import cumulative, randn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*deterministic")


@pytest.mark.parametrize(("total", "dim"), [(1, 1), (5, 24), (3, 300)])
def test_add_rms_norm(total: int, dim: int) -> None:
    h, update, w = randn(total, dim), randn(total, dim, seed=3), weight(dim)
    assert_kernels_agree(lambda h, u, w: both(*add_rms_norm(h, u, w)), h, update, w)
    assert_kernels_agree(lambda h, w: add_rms_norm(h, None, w)[1], h, w)


def test_add_rms_norm_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than rows, and tiles of several rows."""
    from h_net_dynamic_chunking.ops._triton import rms_norm

    monkeypatch.setattr(rms_norm, "_WARPS", 3)
    for rows in (1, 2):
        monkeypatch.setattr(rms_norm, "_FORWARD", (rows, 8))
        monkeypatch.setattr(rms_norm, "_BACKWARD", (rows, 8))
        assert_kernels_agree(
            lambda h, u, w: both(*add_rms_norm(h, u, w)),
            randn(7, 9),
            randn(7, 9, seed=3),
            weight(9),
        )


def test_add_rms_norm_tail_of_nan() -> None:
    cu_seqlens, h, update = cumulative([3, 1], DEVICE), randn(6, 9), randn(6, 9, seed=3)
    with torch.no_grad():
        h[4:], update[4:] = torch.nan, torch.nan
    assert_kernels_agree(
        lambda h, u, w: both(*add_rms_norm(h, u, w, cu_seqlens=cu_seqlens)), h, update, weight(9)
    )


def test_add_rms_norm_of_two_dtypes() -> None:
    """A wide stream, a narrow update: what is added and both gradients are rounded once."""
    h, update = randn(5, 24, device=DEVICE).float(), randn(5, 24, seed=3, device=DEVICE).half()
    results = []
    for backend in ("torch", "triton"):
        leaves = h.detach().requires_grad_(), update.detach().requires_grad_()
        with use_backend(backend):  # type: ignore[arg-type]
            s, out = add_rms_norm(*leaves, weight(24, DEVICE).half())
            grads = torch.autograd.grad((s.sin() + out).sum(), leaves)
        results.append((s, out, *grads))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("total", "width"), [(1, 1), (5, 24), (2, 1500)])
def test_swiglu(total: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one stretch, and in several of which the last is not full."""
    from h_net_dynamic_chunking.ops._triton import swiglu as kernels

    for block in (kernels._BLOCK, 8):
        monkeypatch.setattr(kernels, "_BLOCK", block)
        assert_kernels_agree(swiglu, randn(total, 2 * width))


@pytest.mark.parametrize(("total", "width"), [(1, 1), (5, 24), (2, 1500)])
def test_swiglu_linear(total: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from h_net_dynamic_chunking.ops._triton import swiglu as kernels

    for block in (kernels._BLOCK, 8):
        monkeypatch.setattr(kernels, "_BLOCK", block)
        x, w = randn(total, 2 * width), randn(7, width, seed=1)
        assert_kernels_agree(_swiglu_linear, x, w, low_precision=total > 2)


def test_swiglu_again_is_swiglu() -> None:
    """To the last bit, where the gradient has been; the gradient of x does not depend on it."""
    from h_net_dynamic_chunking.ops._triton.swiglu import swiglu_bwd, swiglu_fwd

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = randn(40, 600, device=DEVICE).detach().to(dtype)
        grad = randn(40, 300, seed=1, device=DEVICE).detach().to(dtype)
        want = swiglu_bwd(grad, x)
        assert torch.equal(swiglu_bwd(grad, x, again=True), want)
        assert torch.equal(grad, swiglu_fwd(x))


@pytest.mark.parametrize(
    ("lens", "heads", "head_dim", "rotary_dim"),
    [([3, 0, 1, 7], 3, 12, 6), ([0, 4, 0], 1, 4, 4), ([1], 2, 5, 0), ([40], 1, 4, 2)],
)
def test_rotary(lens: list[int], heads: int, head_dim: int, rotary_dim: int) -> None:
    """With a tail of NaN behind the sequences."""
    cu_seqlens, qkv = cumulative(lens, DEVICE), randn(sum(lens) + 2, 3 * heads * head_dim)
    with torch.no_grad():
        qkv[sum(lens) :] = torch.nan
    assert_kernels_agree(
        lambda x: joined(*rotary(x, heads, rotary_dim, 50.0, cu_seqlens.int())), qkv
    )


def test_rotary_of_padded_rows() -> None:
    assert_kernels_agree(
        lambda x: joined(*rotary(x.view(2, 5, 36), 2, 4, 50.0)).flatten(1), randn(10, 36)
    )


@pytest.mark.parametrize(("total", "vocab"), [(1, 1), (7, 11), (40, 256)])
def test_cross_entropy(total: int, vocab: int) -> None:
    labels = some_labels(total, vocab, DEVICE)
    assert_kernels_agree(lambda x: summed_cross_entropy(x, labels), randn(total, vocab))


def test_a_label_that_is_none_gives_nan() -> None:
    logits: Tensor = torch.zeros(3, 5, device=DEVICE)
    with use_backend("triton"):
        for label in (5, -1):
            labels = torch.tensor([0, label, 1], device=DEVICE)
            assert summed_cross_entropy(logits, labels).isnan()


def test_sizes_beyond_the_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from h_net_dynamic_chunking.ops import cross_entropy, rms_norm

    monkeypatch.setattr(rms_norm, "_WIDEST", 8)
    monkeypatch.setattr(cross_entropy, "_LARGEST_VOCABULARY", 8)
    x, labels = torch.ones(2, 9, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="rows of up to 8, not 9"):
            add_rms_norm(x, None, x[0])
        with pytest.raises(ValueError, match="vocabularies of up to 8, not 9"):
            summed_cross_entropy(x, labels)
