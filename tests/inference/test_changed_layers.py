"""Layers that somebody has put in the place of a model's own run themselves, in every form."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import DynamicSequenceChunker, HNetLM, generate
from tests.inference.models import random_ids, random_model
from tests.inference.test_parity import feed
from tests.support import assert_close, cumulative, randn

PLACES = [
    "backbone.encoder.layers.0.mixer.in_proj",
    "backbone.network.layers.0.mixer.Wqkv",
    "backbone.chunker.to_queries_keys",
    "backbone.chunker.residual_proj",
    "lm_head",
]
RESIDUAL = "backbone.chunker.residual_proj"
# A prompt in one row and none in another, steps with rows at rest, and pieces.
PIECES = [[9, *[1] * 4, 0, 2], [1, *[1] * 5, 9], [0, *[1] * 5, 10]]


class Wrapper(nn.Module):
    """A low-rank adapter around a linear layer, without the names that such a layer has."""

    def __init__(self, linear: nn.Linear, scale: float = 0.3) -> None:
        super().__init__()
        self.linear = linear
        options = {"dtype": linear.weight.dtype, "bias": False}
        self.a = nn.Linear(linear.in_features, 2, **options)
        self.b = nn.Linear(2, linear.out_features, **options)
        nn.init.normal_(self.b.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.b(self.a(x))
        return out

    def folded(self) -> Tensor:
        return self.linear.weight + self.b.weight @ self.a.weight


class Named(Wrapper):
    """The same as peft has it, with the weight of what it adapts for its own."""

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias


class Subclass(nn.Linear):
    """The same as loralib has it."""

    def __init__(self, linear: nn.Linear, scale: float = 0.3) -> None:
        sizes = linear.in_features, linear.out_features
        super().__init__(*sizes, linear.bias is not None, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.a = nn.Parameter(torch.randn(2, sizes[0], dtype=linear.weight.dtype))
        self.b = nn.Parameter(scale * torch.randn(sizes[1], 2, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T

    def folded(self) -> Tensor:
        return self.weight + self.b @ self.a


ADAPTERS = [Wrapper, Named, Subclass]


def replaced(model: HNetLM, place: str, make: Callable[..., Any], **options: Any) -> HNetLM:
    """A copy whose layer at that place is `make(layer)`."""
    model = copy.deepcopy(model)
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(place), **options))
    return model


def folded(adapted: HNetLM, model: HNetLM, place: str) -> HNetLM:
    """A copy of the model with the adapter at that place summed into the weight."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        layer: Any = adapted.get_submodule(place)
        model.get_parameter(place + ".weight").copy_(layer.folded())
    return model


@pytest.mark.parametrize("plan", ["compact", "masked"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("place", PLACES)
def test_adapters_equal_the_folded_weight(
    place: str, adapter: Callable[..., nn.Module], plan: str
) -> None:
    """In forward, prompts, steps and pieces; float64."""
    model, ids = random_model("one_stage"), random_ids(3, 15)
    adapted = replaced(model, place, adapter)
    with torch.no_grad():
        want = folded(adapted, model, place)(ids).logits
        assert float((want - model(ids).logits).abs().max()) > 1e-3
        assert_close("forward", adapted(ids).logits, want)
    got, _ = feed(adapted, ids, PIECES, plan)
    assert_close("pieces", got, want)


@pytest.mark.parametrize("place", PLACES)
def test_models_with_adapters_generate(place: str) -> None:
    model = random_model("one_stage")
    adapted = replaced(model, place, Wrapper)
    prompts, options = ["ab", "a longer one"], {"temperature": 0, "eos": False}
    want = generate(folded(adapted, model, place), prompts, 12, **options)
    assert generate(adapted, prompts, 12, **options) == want


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_residual_adapter_that_starts_at_zero_changes_nothing(
    adapter: Callable[..., nn.Module],
) -> None:
    """And its gradients are those of the folded weight."""
    model, ids = random_model("one_stage"), random_ids(2, 20)
    adapted = replaced(model, RESIDUAL, adapter, scale=0.0)
    assert_close("logits", adapted(ids).logits, model(ids).logits)
    adapted = replaced(model, RESIDUAL, adapter)
    plain = folded(adapted, model, RESIDUAL)
    for each in (adapted, plain):
        loss = each(ids[:, :-1], ids[:, 1:]).loss
        assert loss is not None
        loss.backward()
    grad = plain.get_parameter(RESIDUAL + ".weight").grad
    layer: Any = adapted.get_submodule(RESIDUAL)
    a, b = (p if isinstance(p, nn.Parameter) else p.weight for p in (layer.a, layer.b))
    assert_close("gradient of a", a.grad, b.T @ grad)
    assert_close("gradient of b", b.grad, grad @ a.T)


def test_hooks_on_the_residual_are_called_and_obeyed() -> None:
    """In forward, in prompts and in steps of either plan."""
    model, ids, seen = random_model("one_stage"), random_ids(2, 12), []
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.get_submodule(RESIDUAL).parameters():
            parameter.mul_(2)
        want = doubled(ids).logits

    def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        seen.append(tuple(inputs[0].shape))
        return 2 * out

    model.get_submodule(RESIDUAL).register_forward_hook(hook)
    with torch.no_grad():
        assert_close("forward", model(ids).logits, want)
    assert seen == [(24, 32)]
    for plan in ("compact", "masked"):
        got, _ = feed(model, ids, [[9, 1, 1, 1]] * 2, plan)
        assert_close(plan, got, want)
    assert len(seen) == 9


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_residual_adapter_sees_packed_tokens(adapter: Callable[..., nn.Module]) -> None:
    """Packed, padded and jagged give the same; pads are not seen."""
    chunker, x, lens = DynamicSequenceChunker(8, handle_residual_proj=True).double(), [], [5, 9]
    layer, tokens = adapter(nn.Linear(8, 8).double()), randn(14, 8).detach()
    layer.register_forward_hook(lambda _, inputs, out: x.append(inputs[0]))
    chunker.residual_proj = layer  # type: ignore[assignment]
    padded = torch.full((2, 9, 8), torch.nan, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor(lens)[:, None]
    padded[real] = tokens
    outputs = [
        chunker(tokens, cu_seqlens=cumulative(lens)),
        chunker(padded, lens),
        chunker(torch.nested.nested_tensor_from_jagged(tokens, cumulative(lens))),
    ]
    packed, rows, jagged = (out.upsample_fn(out.downsampled) for out in outputs)
    assert_close("padded", rows[real], packed)
    assert_close("jagged", jagged.values(), packed)
    assert len(x) == 3
    for given in x:
        assert torch.equal(given, tokens)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_adapter_computes_in_the_dtype_of_its_parameters(
    dtype: torch.dtype, autocast: bool
) -> None:
    """Whatever that of the tokens and of autocast, as the plain layer."""
    chunker = DynamicSequenceChunker(8, handle_residual_proj=True).bfloat16()
    chunker.residual_proj = Wrapper(nn.Linear(8, 8, dtype=dtype))  # type: ignore[assignment]
    seen: list[Tensor] = []
    chunker.residual_proj.register_forward_hook(lambda _, inputs, out: seen.extend((*inputs, out)))
    x = randn(2, 6, 8).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = chunker(x)
        assert out.upsample_fn(out.downsampled).dtype == torch.bfloat16
        assert chunker.residual(x).dtype == torch.float32
    assert [tensor.dtype for tensor in seen] == [dtype] * 4


def test_a_residual_layer_without_parameters() -> None:
    """It is given float32, or float64 where the tokens are."""
    chunker = DynamicSequenceChunker(8, handle_residual_proj=True)
    chunker.residual_proj = nn.Identity()  # type: ignore[assignment]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = randn(2, 6, 8).detach().to(dtype)
        residual = chunker.residual(x)
        assert residual.dtype == wide
        assert torch.equal(residual, x.to(wide))
