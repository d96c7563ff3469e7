"""Narrow states of Mamba-2 in a whole model: every plan, every way to read, torch and kernels."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetLM, generate
from h_net_dynamic_chunking.layers import MambaCache
from h_net_dynamic_chunking.lm_inference import InferenceCache
from h_net_dynamic_chunking.ops.backend import Backend, use_backend
from h_net_dynamic_chunking.recording import _found
from tests.inference.models import CONFIGS, random_ids, random_model

NARROW = [torch.bfloat16, torch.float16]
PROMPTS = [bytes(row[: 1 + 3 * r].tolist()) for r, row in enumerate(random_ids(4, 12))]
BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
            reason="needs Triton's interpreter; tests/inference/test_gpu.py is the same on a GPU",
        ),
    ),
]


def states(cache: InferenceCache) -> list[Tensor]:
    return [part.state for part in _found(cache.backbone, MambaCache)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_call_rounds_the_states(name: str, backend: Backend) -> None:
    """To the bit what a cache gives whose states are rounded by hand after each call."""
    model, ids = random_model(name, torch.float32, d_state=16), random_ids(2, 13)
    caches = [model.allocate_inference_cache(2, 14, state_dtype=t) for t in (torch.bfloat16, None)]
    some = torch.tensor([True, False])

    def read(cache: InferenceCache) -> Any:
        """A prompt, steps of all rows and of one, in either plan, and a piece."""
        yield model(ids[:, :6], lens=torch.tensor([6, 2]), inference_params=cache).logits[:, 1]
        for t, plan in ((6, "masked"), (7, "compact"), (8, "masked")):
            yield model.step(ids[:, t], cache, plan=plan).logits
        for plan in ("masked", "compact"):
            yield model.step(ids[:, 9], cache, active=some, plan=plan).logits
        yield model(ids[:, 10:], inference_params=cache).logits

    with use_backend(backend):
        for got, want in zip(*map(read, caches), strict=True):
            assert torch.equal(got, want)
            for narrow, wide in zip(*map(states, caches), strict=True):
                wide.copy_(wide.bfloat16())
                assert narrow.dtype == torch.bfloat16
                assert torch.equal(narrow.float(), wide)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("name", ["one_stage", "three_stages"])
def test_the_plans_write_the_same(name: str, state_dtype: torch.dtype) -> None:
    """In lock-step, with rows that wait, as a stream, and each row alone; with bytes drawn."""
    model = random_model(name)
    options: dict[str, Any] = {"state_dtype": state_dtype, "eos": False}
    want = generate(model, PROMPTS, 24, seed=0, **options)
    for plan in ("masked", "waiting"):
        assert generate(model, PROMPTS, 24, seed=0, plan=plan, **options) == want
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, prompt, 24, seed=row, **options) == [want[row]]
    pieces = [""] * len(PROMPTS)
    for piece in generate(model, PROMPTS, 24, seed=0, stream=True, **options):
        pieces[piece.row] += piece
    assert pieces == [text.decode(errors="replace") for text in want]


def test_the_states_take_half() -> None:
    """Of a bfloat16 model, whose other caches are as they were."""
    model = random_model("three_stages", torch.bfloat16)
    wide = model.allocate_inference_cache(3, 9)
    for state_dtype in NARROW:
        narrow = model.allocate_inference_cache(3, 9, state_dtype=state_dtype)
        pairs = list(zip(states(narrow), states(wide), strict=True))
        assert len(pairs) == 7
        assert all(2 * one.nbytes == other.nbytes for one, other in pairs)
        convs = (part.conv.dtype for part in _found(narrow.backbone, MambaCache))
        assert set(convs) == {torch.bfloat16}


def test_clones_keep_the_dtype() -> None:
    """And give the same from there."""
    model, ids = random_model("one_stage"), random_ids(2, 12)
    cache = model.allocate_inference_cache(2, 12, state_dtype=torch.float16)
    model(ids[:, :6], inference_params=cache)
    clone = cache.clone()
    assert {state.dtype for state in states(clone)} == {torch.float16}
    ahead = model(ids[:, 6:], inference_params=clone).logits
    assert torch.equal(model(ids[:, 6:], inference_params=cache).logits, ahead)


@pytest.mark.parametrize("name", ["one_stage", "isotropic"])
def test_refused(name: str) -> None:
    """Where it is given, before the model runs."""
    model: HNetLM = random_model(name)
    for wrong in (torch.int32, torch.float64):
        message = f"state_dtype must be torch.float32, .*; got {wrong}"
        with pytest.raises(ValueError, match=message):
            model.allocate_inference_cache(2, 8, state_dtype=wrong)
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPTS, 4, stream=True, state_dtype=wrong)
