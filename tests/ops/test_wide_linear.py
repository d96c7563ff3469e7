"""The float32 linear layer of narrow vectors, and the bfloat16 products that stand for it."""

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking.ops import dechunk, segment, use_backend, wide_linear
from h_net_dynamic_chunking.ops import wide_products as products
from tests.support import (
    DEVICES,
    Errors,
    assert_close,
    assert_draws_within_low_precision_budget,
    assert_rounded_once,
    assert_same_function,
    assert_within_low_precision_budget,
    boundaries,
    compiled,
    cumulative,
    probabilities,
    randn,
)


def oracle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack([(weight * row).sum(1) + bias for row in x]) if len(x) else x @ weight.T


def layer(rows: int = 7, device: str = "cpu") -> list[Tensor]:
    """x, weight and bias."""
    x, weight = randn(rows, 5, device=device), randn(3, 5, seed=1, device=device)
    return [x, weight, randn(3, seed=2, device=device)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [7, 1, 0])
def test_oracle(rows: int, device: str) -> None:
    assert_same_function(wide_linear, oracle, layer(rows, device))


def test_gradcheck_opcheck_and_compilation() -> None:
    x, weight, bias = layer()
    assert torch.autograd.gradcheck(wide_linear, (x, weight, bias))
    assert torch.autograd.gradcheck(wide_linear, (x, weight))
    ops, grad = torch.ops.h_net, randn(7, 3).detach()
    torch.library.opcheck(ops.wide_linear.default, (x, weight, bias))
    torch.library.opcheck(ops.wide_linear_backward.default, (grad, x.detach(), weight.detach()))
    run, compilations = compiled(wide_linear)
    for rows in (7, 9, 12):
        assert_same_function(run, oracle, layer(rows))
    assert compilations() == 1


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(5)])
def test_refuses_weights_that_do_not_fit(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        wide_linear(torch.zeros(2, 5), weight)
    with pytest.raises(ValueError, match="bias must have shape"):
        wide_linear(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of tensor cores, which a CPU does not offer: exact, and added in float32."""

    def multiply(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.float() @ b.float()
        return product if plus is None else plus.add_(product)

    if not torch.cuda.is_available():
        monkeypatch.setattr(products, "splits", lambda *_: True)
        monkeypatch.setattr(products, "_multiply", multiply)
        monkeypatch.setattr(products, "_multiply_batched", lambda a, b: a.float() @ b.float())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_as_exact_as_float32_ones(dtype: torch.dtype) -> None:
    """Against float64, of weights of every order of magnitude."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, grad = (randn(300, 256, seed=s, device=device).detach().bfloat16() for s in (0, 1))
    weight = (randn(256, 256, seed=2, device=device).detach() / 16).to(dtype)
    weight *= torch.logspace(-20, 2, 256, device=device)[:, None].to(dtype)
    with use_backend("triton"):
        y = products.product(x, weight)
        grad_x, grad_weight, grad_bias = products.gradients(grad, x, weight)
    assert_columns_as_exact("y", y, x, weight.T, times=1.5)
    if dtype == torch.float32:
        assert_columns_as_exact("gradient of weight", grad_weight, grad.T, x, times=2)
    else:
        assert_rounded_once("gradient of weight", grad_weight, grad.double().T @ x.double())
    assert_nothing_but_rounded(grad_x, grad.double() @ weight.double())
    assert_rounded_once("gradient of bias", grad_bias, grad.double().sum(0))


def assert_columns_as_exact(name: str, got: Tensor, a: Tensor, b: Tensor, times: float) -> None:
    """As a b is in float32. Columns are draws, in units of the last bit of their largest number."""
    exact = a.double() @ b.double()
    unit = torch.finfo(torch.float32).eps * exact.abs().amax(0)
    forms = ((form - exact).abs().amax(0) / unit for form in (got, a.float() @ b.float()))
    errors = [Errors(*column) for column in zip(*(form.tolist() for form in forms), strict=True)]
    assert_draws_within_low_precision_budget(name, errors, times)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 8, 3), (70, 40, 130), (130, 200, 33)])
def test_kernel(rows: int, width: int, outputs: int, dtype: torch.dtype) -> None:
    """Sizes that fill no tile, rows that are slices, and a bias of either dtype."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = randn(rows, width + 5, device=device).detach().bfloat16()[:, 3 : 3 + width]
    weight = randn(outputs, width, seed=1, device=device).detach().to(dtype)
    for bias in (None, randn(outputs, seed=2, device=device).detach().to(dtype)):
        with use_backend("triton"):
            y = products.product(x, weight, bias)
        assert y.dtype == torch.float32
        exact = x.double() @ weight.double().T
        assert_close("y", y, exact if bias is None else exact + bias.double())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [15, 16, 48, 50])
def test_long_sums_come_in_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_piece", lambda _: 16)
    monkeypatch.setattr(products, "_AT_ONCE", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, grad = (randn(rows, 8, seed=s, device=device).detach().bfloat16() for s in (0, 1))
    _, grad_weight, _ = products.gradients(grad, x, torch.zeros(8, 8, device=device))
    torch.testing.assert_close(grad_weight, (grad.double().T @ x.double()).float())


@pytest.mark.usefixtures("emulated")
def test_two_parts_do_where_the_result_is_rounded() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = randn(100, 64, device=device).detach().bfloat16()
    weight = randn(64, 64, seed=2, device=device).detach().float()
    exact = x.double() @ weight.double().T
    got = products.product(x, weight, rounded_to=torch.bfloat16).bfloat16()
    assert_nothing_but_rounded(got, exact)


def assert_nothing_but_rounded(got: Tensor, exact: Tensor) -> None:
    """All errors together are those of rounding the exact numbers, and the largest is twice theirs.

    Numbers that are small beside those that they are sums of may be off by more than a last bit.
    """
    rounded = exact.to(got.dtype)
    error, least = ((y - exact).square().mean() for y in (got, rounded))
    assert error <= 1.001 * least, f"{float(error / least)} times the least"
    assert_within_low_precision_budget(got, rounded, exact)


@pytest.mark.usefixtures("emulated")
def test_autocast_changes_nothing() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(5, 8, device=device), torch.randn(8, 8, device=device)
    want = x.bfloat16().double() @ weight.double().T
    with torch.autocast(device, dtype=torch.bfloat16):
        got = wide_linear(x.bfloat16(), weight)
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [[3, 0, 1, 40], [0]])
def test_dechunking_projects_its_residual(lens: list[int], device: str) -> None:
    total = sum(lens)
    segmentation = segment(boundaries(total, device=device), cumulative(lens, device))
    z = randn(len(segmentation.boundary_positions), 3, device=device)
    assert_same_function(
        lambda z, p, x, w, b: dechunk(z, p, segmentation, x, projection=(w, b)),
        lambda z, p, x, w, b: dechunk(z, p, segmentation, wide_linear(x, w, b)),
        [z, probabilities(total, device=device), *layer(total, device)],
    )


@pytest.mark.parametrize(
    ("residual", "weight", "message"),
    [
        (None, (3, 5), "projection must be None where there is no residual"),
        ((4, 5), (2, 5), "projection must make 3 channels"),
        ((4, 5), (3, 4), "weight must have shape"),
        ((2, 5), (3, 5), "residual must have shape"),
    ],
)
def test_dechunking_refuses_what_does_not_fit(
    residual: tuple[int, int] | None, weight: tuple[int, int], message: str
) -> None:
    segmentation = segment(torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]))
    x = None if residual is None else torch.zeros(residual)
    projection = torch.zeros(weight), None
    with pytest.raises(ValueError, match=message):
        dechunk(torch.zeros(4, 3), torch.ones(4), segmentation, x, projection=projection)
