"""Layers whose second product keeps no input: the numbers of plain ones, and less memory."""

import copy
from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from h_net_dynamic_chunking.layers import Mamba2, SwiGLU
from h_net_dynamic_chunking.layers.recomputation import recomputed
from h_net_dynamic_chunking.ops import Mamba2Parameters, mamba2_inner, use_backend
from h_net_dynamic_chunking.ops.swiglu_linear import _swiglu_linear, swiglu_linear
from h_net_dynamic_chunking.ops.unkept_input import weight_to_take
from tests.ops.mamba2_cases import mamba2_inputs
from tests.support import DEVICES, assert_close, compiled, cumulative, randn

WIDTH = 32
# Layers whose second product, of the name, has rows of 128 numbers.
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "fc2": lambda: SwiGLU(WIDTH, 128),
    "out_proj": lambda: Mamba2(WIDTH, d_state=24, expand=4, head_dim=16),
}
NAMES = list(MAKERS)


def new_layer(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().to(device, dtype)


def by_itself(layer: nn.Module, name: str) -> nn.Module:
    """A copy that calls the second product as a module, because it is watched."""
    plain = copy.deepcopy(layer)
    getattr(plain, name).register_forward_hook(lambda *_: None)
    return plain


def rows(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return randn(*shape, WIDTH, seed=1, device=device).detach().to(dtype).requires_grad_()


def results(layer: nn.Module, x: Tensor, *lengths: Tensor) -> list[Tensor]:
    """The value, and the gradients of x and of all parameters."""
    out = layer(x, *lengths)
    wanted = [x, *layer.parameters()]
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


def kept(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what a forward pass saves for its backward pass."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return shapes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 70), (1, 1), (2, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_same_numbers(name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """On torch to the last bit. The kernel of the gated norm has its last bit from another sum."""
    layer, x = new_layer(name, dtype, device), rows(*shape, dtype=dtype, device=device)
    with use_backend("torch"):
        pairs = zip(results(layer, x), results(by_itself(layer, name), x), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)
    for got, want in zip(results(layer, x), results(by_itself(layer, name), x), strict=True):
        assert_close("result", got, want, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3)])
def test_mlp_of_any_dimensions(shape: tuple[int, ...]) -> None:
    layer, x = new_layer("fc2"), rows(*shape)
    for got, want in zip(results(layer, x), results(by_itself(layer, "fc2"), x), strict=True):
        assert_close("result", got, want)


def test_packed_mamba2_with_a_tail_of_nan() -> None:
    layer, x, cu_seqlens = new_layer("out_proj"), rows(12), cumulative([3, 0, 6])
    with torch.no_grad():
        x[9:] = torch.nan
    got, want = (results(m, x, cu_seqlens) for m in (layer, by_itself(layer, "out_proj")))
    assert all(map(torch.equal, got, want))
    assert not any(result.isnan().any() for result in got)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_not_kept(name: str) -> None:
    """The gated rows of the one, the normed rows of the other."""
    layer, x = new_layer(name), rows(2, 70)
    lean, plain = (kept(lambda m=m: m(x)) for m in (layer, by_itself(layer, name)))
    assert sum(map(prod, lean)) == sum(map(prod, plain)) - 140 * 128


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    """Its dtype, gradients of float32 weights in theirs, and the bits of the plain layer."""
    layer, x = new_layer(name, torch.float32), rows(2, 70, dtype=torch.float32)
    both = []
    for m in (layer, by_itself(layer, name)):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
        assert out.dtype == torch.bfloat16
        both.append([out, *torch.autograd.grad(out.sum(), [x, *m.parameters()])])
    assert all(map(torch.equal, *both))
    assert all(gradient.dtype == torch.float32 for gradient in both[0][1:])


class _Adapter(nn.Module):
    """What adapters do: a frozen layer, and two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def _hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return linear


def _parametrized(linear: nn.Linear) -> nn.Module:
    nn.utils.parametrizations.weight_norm(linear)
    linear.parametrizations.weight.original0.data.mul_(2)  # type: ignore[index, union-attr]
    return linear


def _with_bias(linear: nn.Linear) -> nn.Module:
    linear.bias = nn.Parameter(torch.ones(linear.out_features, dtype=linear.weight.dtype))
    return linear


def _forward_replaced(linear: nn.Linear) -> nn.Module:
    linear.forward = lambda x: x[..., :WIDTH]  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    "change", [_Adapter, _hooked, _parametrized, _with_bias, _forward_replaced]
)
@pytest.mark.parametrize("name", NAMES)
def test_changed_layers_run_themselves(name: str, change: Callable[..., nn.Module]) -> None:
    """With what they are given by the plain one."""
    layer, x, seen = new_layer(name), rows(2, 5), []
    probe = copy.deepcopy(layer)
    getattr(probe, name).register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    before = probe(x)
    changed = change(getattr(layer, name))
    setattr(layer, name, changed)
    out = layer(x)
    assert not torch.equal(out, before)
    assert torch.equal(out, changed(seen[0]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_fused_where_nothing_is_gained(name: str) -> None:
    layer, a = new_layer(name), rows(3, 4)
    linear = getattr(layer, name)
    assert weight_to_take(linear, a) is linear.weight
    with torch.no_grad():
        assert weight_to_take(linear, a) is None
    assert weight_to_take(linear, a.detach()) is None
    assert weight_to_take(linear, a.float()) is None
    with FlopCounterMode(display=False):
        assert weight_to_take(linear, a) is None
    linear.weight.requires_grad_(False)
    assert weight_to_take(linear, a) is None


@pytest.mark.parametrize("name", NAMES)
def test_products_are_counted(name: str) -> None:
    """By whoever watches torch operations, where a product inside of another would be missed."""
    flops, layer, x = [], new_layer(name), rows(2, 5)
    for m in (layer, by_itself(layer, name)):
        with FlopCounterMode(display=False) as counter:
            m(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 3 * 2 * 10 * getattr(layer, name).weight.numel()


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_a_functional_call(name: str) -> None:
    layer, x = new_layer(name), rows(2, 5)
    weights = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, weights, (x,))
    got = out, *torch.autograd.grad(out.sin().sum(), [x, *weights.values()])
    assert all(map(torch.equal, got, results(layer, x)))


@pytest.mark.parametrize("name", NAMES)
def test_recomputation(name: str) -> None:
    layer, x = new_layer(name), rows(2, 70)
    again = lambda x: recomputed(layer, x)  # noqa: E731
    assert sum(map(prod, kept(lambda: again(x)))) <= x.numel()
    out = again(x)
    got = [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]
    assert all(map(torch.equal, got, results(layer, x)))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_once_for_all_lengths(name: str) -> None:
    """As the same operation, so that a compiled layer keeps no more."""
    layer, counts = new_layer(name), []
    run, compilations = compiled(lambda x: layer(x))
    for length in (7, 21, 43):
        x = rows(2, length)
        out = run(x)
        got = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
        for one, other in zip((out, *got), results(layer, x), strict=True):
            assert_close("result", one, other)
        counts.append(compilations())
    assert counts == counts[:1] * 3
    assert sum(map(prod, kept(lambda: run(x)))) <= sum(map(prod, kept(lambda: layer(x))))


def test_backward_repeats_and_runs_where_its_forward_did() -> None:
    for name in NAMES:
        layer, x = new_layer(name), rows(2, 5)
        with use_backend("torch"):
            loss = layer(x).sin().sum()
        inputs = [x, *layer.parameters()]
        with use_backend("triton"):  # which takes no float64, and would raise
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            second = torch.autograd.grad(loss, inputs)
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_that_are_refused(name: str) -> None:
    layer, x = new_layer(name), rows(2, 5)
    weight = getattr(layer, name).weight
    for wanted in (x, weight):
        (first,) = torch.autograd.grad(layer(x).sin().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="backward has no derivative"):
            torch.autograd.grad(first.sum(), wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(dual)


def test_gradcheck_and_opcheck_of_swiglu() -> None:
    x, weight = randn(2, 2, 6), randn(4, 3, seed=1)
    assert torch.autograd.gradcheck(_swiglu_linear, (x, weight))
    torch.library.opcheck(torch.ops.h_net.swiglu_linear.default, (x, weight))
    backward = randn(2, 2, 4, seed=2).detach(), x.detach(), weight.detach()
    torch.library.opcheck(torch.ops.h_net.swiglu_linear_backward.default, backward)
    # Whatever the strides.
    grad, x, weight = (t.transpose(0, 1) for t in backward)
    torch.library.opcheck(
        torch.ops.h_net.swiglu_linear_backward.default,
        (grad, x, weight.t()),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4, 5])])
def test_gradcheck_and_opcheck_of_mamba2(cu_seqlens: Tensor | None) -> None:
    positions = (1, 5) if cu_seqlens is None else (5,)
    inputs = *mamba2_inputs(*positions, heads=1, head_dim=2, d_state=2), randn(3, 2, seed=9)

    def run(projected: Tensor, *rest: Tensor) -> Tensor:
        *parameters, weight = rest
        named = Mamba2Parameters(*parameters)
        return mamba2_inner(projected, named, cu_seqlens, out_weight=weight, chunk_size=2)

    assert torch.autograd.gradcheck(run, inputs)
    rest = (1e-5, cu_seqlens, 2)
    torch.library.opcheck(torch.ops.h_net.mamba2_inner.default, (*inputs, *rest))
    plain = tuple(x.detach() for x in inputs)
    grad, y, convolved = (randn(*positions, d, seed=d).detach() for d in (3, 2, 6))
    backward = (grad, *plain, *rest, y, convolved, y.new_empty(0, 1, 2, 2))
    torch.library.opcheck(torch.ops.h_net.mamba2_inner_backward.default, backward)


def test_bad_inputs() -> None:
    linear = nn.Linear(3, 4, bias=False)
    with pytest.raises(ValueError, match="x must have an even last dimension"):
        swiglu_linear(torch.ones(2, 5), linear)
    projected, *parameters = mamba2_inputs(5)
    for weight in (torch.ones(4, 6), randn(4, 5), randn(6)):
        with pytest.raises(ValueError, match=r"out_weight must be torch.float64 of shape \(d_m"):
            mamba2_inner(
                projected, Mamba2Parameters(*parameters), cumulative([5]), out_weight=weight
            )
