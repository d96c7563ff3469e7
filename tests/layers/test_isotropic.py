"""The stack: causality, pads, precision of the residual stream, layouts, replaced mixers."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from h_net_dynamic_chunking.layers import CausalAttention, Isotropic, Mamba2, MixerFactory, RMSNorm
from tests.layers.stacks import D_MODEL, STACKS, small_stack


@pytest.mark.parametrize(("layout", "window_size"), STACKS)
def test_causal(layout: str, window_size: int) -> None:
    """A changed input changes its own output and none before it."""
    stack = small_stack(layout, window_size).double()
    x = torch.randn(2, 21, D_MODEL, dtype=torch.float64)
    before = stack(x)
    for position in (0, 7, 8, 20):
        changed = x.clone()
        changed[:, position] += 1
        difference = (stack(changed) - before).abs().amax((0, 2))
        assert difference[:position].sum() < 1e-12, position
        assert difference[position] > 1e-6, position


@pytest.mark.parametrize(("layout", "window_size"), STACKS)
def test_right_pads_change_nothing(layout: str, window_size: int) -> None:
    """Neither outputs nor gradients, whatever finite values stand in the pads."""
    stack = small_stack(layout, window_size).double()
    x = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    padded = torch.cat([x, 100 * torch.randn(2, 9, D_MODEL, dtype=torch.float64)], dim=1)
    out, out_padded = stack(x), stack(padded)[:, :11]
    torch.testing.assert_close(out_padded, out)
    weights = tuple(stack.parameters())
    for got, want in zip(
        torch.autograd.grad(out_padded.square().sum(), weights),
        torch.autograd.grad(out.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_window_limits_the_reach() -> None:
    """Two layers that see 3 positions to the left reach 6."""
    stack = small_stack("T2", window_size=3).double()
    x = torch.randn(1, 12, D_MODEL, dtype=torch.float64)
    changed = x.clone()
    changed[:, 2] += 1
    difference = (stack(changed) - stack(x)).abs().amax((0, 2))
    assert difference[8] > 1e-9
    assert difference[9:].sum() < 1e-12


def test_blocks_are_pre_norm_with_every_residual() -> None:
    """h += mixer(norm1(h)), capitals also h += mlp(norm2(h)), then the closing norm."""
    stack = small_stack("m1T1").double()
    first, second = stack.layers
    for norm in (first.norm1, second.norm1, second.norm2, stack.rmsnorm):
        norm.weight.data.uniform_(0.5, 2)

    def normed(norm: RMSNorm, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    x = torch.randn(2, 5, D_MODEL, dtype=torch.float64)
    h = x + first.mixer(normed(first.norm1, x))
    h = h + second.mixer(normed(second.norm1, h))
    h = h + second.mlp(normed(second.norm2, h))
    torch.testing.assert_close(stack(x), normed(stack.rmsnorm, h))


def test_layout_builds_the_layers_and_keys() -> None:
    """Letters in order; lower case has no key of an MLP."""
    stack = small_stack("T1m12M2")
    kinds = [type(layer.mixer) for layer in stack.layers]
    assert kinds == [CausalAttention] + [Mamba2] * 14
    with_mlp = [layer.mlp is not None for layer in stack.layers]
    assert with_mlp == [True] + [False] * 12 + [True] * 2
    prefixes = {name.split(".")[2] for name in stack.state_dict() if name.startswith("layers.1.")}
    assert prefixes == {"norm1", "mixer"}
    assert "rmsnorm.weight" in stack.state_dict()


def all_bfloat16(stack: Isotropic, x: Tensor) -> Tensor:
    """The stack as plain bfloat16 code would run it: every residual sum rounded to bfloat16."""
    for layer in stack.layers:
        x = sum(layer(x)).bfloat16()
    out: Tensor = stack.rmsnorm(x)
    return out


@pytest.mark.parametrize("layout", ["m3", "T2", "T1m2M1"])
def test_bfloat16_error_budget(layout: str) -> None:
    """At most twice the error, against float64, of plain bfloat16 code with the same weights."""
    x = torch.randn(2, 40, D_MODEL).bfloat16()
    stack = small_stack(layout).bfloat16()
    out, plain = stack(x), all_bfloat16(stack, x)
    exact = stack.double()(x.double())
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_residual_stream_is_at_least_float32(dtype: torch.dtype) -> None:
    """The stream is wide whatever the weights are; what comes out has the weights' dtype."""
    stack = small_stack("m1T1").to(dtype)
    seen: list[torch.dtype] = []
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    out = stack(torch.randn(1, 4, D_MODEL, dtype=dtype))
    assert seen == [torch.promote_types(dtype, torch.float32)] * 2
    assert out.dtype == dtype


def test_autocast() -> None:
    """Under autocast values stay near float32's, and gradients reach float32 parameters."""
    stack = small_stack("T1m2M1")
    x = torch.randn(2, 20, D_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(x)
    out.sum().backward()
    torch.testing.assert_close(out, stack(x), rtol=0.05, atol=0.05)
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_mixers_can_be_replaced_and_added() -> None:
    """A letter's constructor gets d_model; m keeps its own when only t is replaced."""

    def linear(d_model: int) -> nn.Module:
        return nn.Linear(d_model, d_model)

    stack = Isotropic(
        "t1m1G1",
        D_MODEL,
        ssm={"head_dim": 16},
        mixers={"t": linear, "g": linear},
    )
    assert [type(layer.mixer) for layer in stack.layers] == [nn.Linear, Mamba2, nn.Linear]
    assert stack(torch.randn(2, 3, D_MODEL)).shape == (2, 3, D_MODEL)


@pytest.mark.parametrize("length", [0, 1])
def test_empty_and_single(length: int) -> None:
    assert small_stack("T1m1", 3)(torch.randn(2, length, D_MODEL)).shape == (2, length, D_MODEL)


@pytest.mark.parametrize("layout", ["", "m", "4m", "m4 T1", "m0", "m04", "m-1", "m4,T1", "["])
def test_unreadable_layout(layout: str) -> None:
    with pytest.raises(ValueError, match="layout must be groups of a letter and a count") as error:
        small_stack(layout)
    assert repr(layout) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "x2"}, "layout must use the letters m, t or their capitals, got 'x' in 'x2'"),
        ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({"layout": "T1", "d_intermediate": -1}, "d_intermediate must be"),
        ({"layout": "t1", "attention": {"num_heads": 5}}, "num_heads must divide d_model = 32"),
        ({"ssm": {"d_state": 8}, "mixers": {"m": nn.Identity}}, "ssm must be None when mixers"),
        ({"mixers": {"m": lambda d: abs}}, "mixer must be a torch.nn.Module, got builtin"),
        ({"activation_checkpointing": "no"}, "activation_checkpointing must be True or False"),
        ({"mixers": {"M": nn.Identity}}, "mixers must have single lower-case letters as keys"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Isotropic(**{"layout": "m1", "d_model": D_MODEL, **arguments})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 32\)"):
        small_stack("m1")(torch.randn(2, 3, 31))
    with pytest.raises(ValueError, match=r"x must be floating-point, got torch\.int64"):
        small_stack("m1")(torch.ones(2, 3, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_seqlens must be a tensor, got list"):
        small_stack("m1")(torch.randn(3, 32), [0, 3])


@pytest.mark.parametrize(
    ("mixer", "got"),
    [
        (lambda d: nn.Linear(d, 1), r"Linear gave \(2, 3, 1\)"),
        (lambda d: nn.GRU(d, d, batch_first=True), "GRU gave tuple"),
    ],
)
def test_what_mixers_return_is_checked(mixer: MixerFactory, got: str) -> None:
    """The first would be broadcast over the stream."""
    with pytest.raises(ValueError, match=rf"mixer must return a tensor.*\(2, 3, 32\); {got}"):
        Isotropic("x1", D_MODEL, mixers={"x": mixer})(torch.randn(2, 3, D_MODEL))


# dynamo looks at the inputs of the second block, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compile_one_by_one() -> None:
    """Whole graphs; other lengths need no other ones."""
    stack, plain = small_stack("T2").double(), small_stack("T2").double()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for number, block in enumerate(stack.layers):
        stack.layers[number] = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    graphs: set[int] = set()
    for length in (5, 17):
        x = torch.randn(2, length, D_MODEL, dtype=torch.float64)
        out, want = stack(x), plain(x)
        torch.testing.assert_close(out, want)
        out.sum().backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_norms_that_are_watched_or_replaced_are_called() -> None:
    """Otherwise a norm is one operation with the addition before it, which calls no module."""
    stack, x, calls = small_stack("T1m1"), torch.randn(2, 5, D_MODEL), []
    want = stack(x)
    for norm in (stack.layers[0].norm2, stack.rmsnorm):
        norm.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].dtype))
    torch.testing.assert_close(stack(x), want)
    assert calls == [torch.float32] * 2
    stack.layers[1].norm1.register_full_backward_hook(lambda *_: calls.append("backward"))
    stack(x.requires_grad_()).sum().backward()
    assert calls.count("backward") == 1
    plain = stack.layers[0].norm1.forward
    stack.layers[0].norm1.forward = lambda x: (calls.append("replaced"), plain(x))[1]
    torch.testing.assert_close(stack(x), want)
    assert calls.count("replaced") == 1
    stack.layers[1].norm1 = nn.LayerNorm(D_MODEL)
    assert stack(x).shape == x.shape
