"""The packed form of every layer: equal to each sequence alone and to the padded form."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.layers import CausalAttention, Isotropic, Mamba2, attention
from tests.layers.stacks import D_MODEL, STACKS, small_stack
from tests.support import (
    Errors,
    assert_close,
    assert_draws_within_low_precision_budget,
    compiled,
    cumulative,
    randn,
)

# With chunks of 8 and a window of 3: both crossed, starts inside chunks and at their edges, empty
# sequences at the ends and inside.
LENGTHS = [[21], [3, 0, 1, 20, 2, 9], [0, 8, 16, 0], [1, 1, 1], [0, 0], []]


def mixer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mamba":
        return Mamba2(D_MODEL, d_state=8, head_dim=16, chunk_size=8)
    return CausalAttention(D_MODEL, 2, window_size={"attention": -1, "window": 3}[kind])


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: mixer(kind) for kind in ("mamba", "attention", "window")},
    **{
        f"{layout},{window}": lambda layout=layout, window=window: small_stack(layout, window)
        for layout, window in STACKS
    },
}


def one_by_one(module: nn.Module, x: Tensor, lens: list[int]) -> Tensor:
    outs = [module(part[None])[0] for part in x[: sum(lens)].split(lens)] if lens else []
    return torch.cat([*outs, x[sum(lens) :] * 0])


def padded(module: nn.Module, x: Tensor, lens: list[int]) -> Tensor:
    parts = x[: sum(lens)].split(lens) if lens else []
    length = max(lens, default=0)
    rows = [torch.cat([part, part.new_ones(length - len(part), D_MODEL)]) for part in parts]
    outs = module(torch.stack(rows)) if rows else []
    return torch.cat([*(row[:n] for row, n in zip(outs, lens, strict=True)), x[sum(lens) :] * 0])


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Under random weights on the output; zeros where no path leads."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    weights = randn(64, D_MODEL, seed=5).detach().to(out.device)
    loss = (out * weights[: len(out)]).sum()
    loss = loss + sum(leaf.sum() * 0 for leaf in (x, *parameters))
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters)), strict=True))


@pytest.mark.parametrize("lens", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_packed_equals_one_by_one_equals_padded(kind: str, lens: list[int]) -> None:
    """Values and all gradients in float64; int64 lengths, no tail."""
    module = MODULES[kind]().double()
    x = randn(sum(lens), D_MODEL)
    out = module(x, cumulative(lens))
    got = gradients(out, x, module)
    for oracle in (one_by_one, padded):
        want = oracle(module, x, lens)
        assert_close(f"output, {oracle.__name__}", out, want)
        for name, gradient in gradients(want, x, module).items():
            assert_close(f"gradient of {name}, {oracle.__name__}", got[name], gradient)


@pytest.mark.parametrize("kind", MODULES)
def test_nan_tail(kind: str) -> None:
    """NaN behind the last sequence reaches nothing; zeros come out, no gradient comes back."""
    module, lens = MODULES[kind]().double(), [5, 0, 12]
    x = randn(17, D_MODEL)
    poisoned = torch.cat([x.detach(), torch.full((6, D_MODEL), torch.nan)]).requires_grad_()
    want, out = module(x, cumulative(lens)), module(poisoned, cumulative(lens).int())
    assert_close("output", out[:17], want)
    assert (out[17:] == 0).all()
    got, alone = gradients(out, poisoned, module), gradients(want, x, module)
    assert (got["x"][17:] == 0).all()
    got["x"] = got["x"][:17]
    for name, gradient in alone.items():
        assert_close(f"gradient of {name}", got[name], gradient)


@pytest.mark.parametrize("kind", ["window", "T1m2M1,-1"])
def test_no_tail(kind: str) -> None:
    """Said or not: the same."""
    module, lens, x = MODULES[kind]().double(), [5, 0, 12], randn(17, D_MODEL)
    out, want = module(x, cumulative(lens), has_tail=False), module(x, cumulative(lens))
    assert_close("output", out, want)
    got, alone = gradients(out, x, module), gradients(want, x, module)
    for name, gradient in alone.items():
        assert_close(f"gradient of {name}", got[name], gradient)


def test_packed_bfloat16() -> None:
    """The layout of the sequences is no more than a matter of rounding."""
    stack, lens = small_stack("T1m2M1", 3).bfloat16(), [3, 20, 9]
    x = torch.randn(32, D_MODEL).bfloat16()
    out = stack(x, cumulative(lens))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, one_by_one(stack, x, lens), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("has_window", [True, False])
def test_varlen_attention(monkeypatch: pytest.MonkeyPatch, has_window: bool) -> None:
    """What the kernel is given, in both of its signatures, and that its tail is not used."""
    mixer = MODULES["window" if has_window else "attention"]().double()
    lens, x = [3, 0, 20], randn(25, D_MODEL)
    want = mixer(x, cumulative(lens))
    given: dict[str, object] = {}

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, longest: int, __: int, **options
    ) -> Tensor:
        given.update(options, dtype=ends.dtype, longest=longest)
        mixed = mixer._attend_one_by_one(q, k, v, ends)
        return torch.cat([mixed[:23], mixed[23:] * torch.nan])

    monkeypatch.setattr(attention, "_varlen", lambda: kernel)
    monkeypatch.setattr(attention, "_VARLEN_HAS_WINDOW", has_window)
    monkeypatch.setattr(CausalAttention, "_varlen_can_run", lambda self, q: True)
    assert_close("output", mixer(x, cumulative(lens)), want)
    causal = {"window_size": (3, 0)} if has_window else {"is_causal": True}
    assert given == {"dtype": torch.int32, "longest": 20, **causal}
    mixer(x, cumulative(lens), max_seqlen=24)
    assert given["longest"] == 24
    # Told that there is no tail, nobody looks for one.
    assert mixer(x, cumulative(lens), has_tail=False)[23:].isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["attention", "window", "T1m2M1,-1", "M1t1m1,3"])
def test_packed_on_a_gpu(kind: str) -> None:
    """In bfloat16, with a NaN tail: at most twice the error of the padded form, against float64.

    Over many draws of x: some parameters have four numbers, and the gradients of others reach 20,
    where bfloat16 goes in steps of 1/8, more than all the error before.
    """
    module = MODULES[kind]().bfloat16().cuda()
    draws = [packed_plain_and_exact(module, randn(52, D_MODEL, seed=s).detach()) for s in range(32)]
    for name in draws[0][0]:
        errors = [Errors.of(*(form[name] for form in forms)) for forms in draws]
        assert_draws_within_low_precision_budget(name, errors)


def packed_plain_and_exact(module: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], ...]:
    """The output and all gradients: packed, sequence by sequence, and that in float64."""
    lens, x = [21, 0, 1, 30], x.bfloat16()
    poisoned = torch.cat([x, x.new_full((6, D_MODEL), torch.nan)]).cuda().requires_grad_()
    out = module(poisoned, cumulative(lens, "cuda"))
    packed = {"output": out[:52], **gradients(out, poisoned, module)}
    assert (out[52:] == 0).all()
    assert (packed["x"][52:] == 0).all()
    packed["x"] = packed["x"][:52]
    forms = [packed]
    for form, dtype in ((module, torch.bfloat16), (deepcopy(module).double(), torch.float64)):
        leaf = x.cuda().to(dtype).requires_grad_()
        out = one_by_one(form, leaf, lens)
        forms.append({"output": out, **gradients(out, leaf, form)})
    return tuple(forms)


def test_compiles() -> None:
    """Whole graph, without attention, which reads the lengths on the host; one for all lengths."""
    stack = small_stack("m1M1").double()
    run, compilations = compiled(lambda x, cu_seqlens: stack(x, cu_seqlens))
    counts = []
    for lens in ([4, 0, 6], [2, 9, 3], [6, 0, 47]):
        x = randn(sum(lens) + 1, D_MODEL)
        out, want = run(x, cumulative(lens)), stack(x, cumulative(lens))
        assert_close("output", out, want)
        expected = gradients(want, x, stack)
        for name, gradient in gradients(out, x, stack).items():
            assert_close(f"gradient of {name}", gradient, expected[name])
        counts.append(compilations())
    assert counts == counts[:1] * 3


def test_mixers_without_cu_seqlens_are_refused() -> None:
    """By name; a mixer that is compiled still shows what it takes."""

    def linear(d_model: int) -> nn.Module:
        return nn.Linear(d_model, d_model)

    stack = Isotropic("m1t1", D_MODEL, ssm={"head_dim": 16}, mixers={"t": linear})
    with pytest.raises(ValueError, match="cu_seqlens must be None: layer 1 has a Linear, whose"):
        stack(torch.randn(4, D_MODEL), cumulative([4]))

    def compiled_mamba(d_model: int) -> nn.Module:
        return torch.compile(Mamba2(d_model, head_dim=16), backend="eager")

    stack = Isotropic("m1", D_MODEL, mixers={"m": compiled_mamba})
    with torch.no_grad():
        assert stack(torch.randn(4, D_MODEL), cumulative([4])).shape == (4, D_MODEL)


@pytest.mark.parametrize("kind", ["mamba", "attention", "T1m2M1,-1"])
def test_bad_input(kind: str) -> None:
    module, x = MODULES[kind](), torch.randn(4, D_MODEL)
    with pytest.raises(ValueError, match=r"x must have shape \(total, 32\) with cu_seqlens, got"):
        module(x[None], cumulative([4]))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        module(x, torch.tensor([0.0, 4.0]))
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(batch \+ 1,\)"):
        module(x, torch.tensor([[0, 4]]))
