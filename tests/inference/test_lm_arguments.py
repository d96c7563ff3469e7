"""What HNetLM refuses while decoding, and that a refusal changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import HNetLM
from h_net_dynamic_chunking.cache import tensors_of
from tests.inference.models import random_ids, random_model

IDS = random_ids(2, 6)


def attempts(model: HNetLM) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """What goes wrong: the message, and the call, which gets a cache for 2 rows of 8 bytes."""

    def forward(*args: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda cache: model(*args, inference_params=cache, **options)

    def step(ids: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda cache: model.step(ids, cache, **options)

    return {
        "another batch": ("for the 1 rows of input_ids, got some for 2", step(IDS[:1, 0])),
        "several bytes": (r"input_ids must have shape \(batch, 1\) or", step(IDS)),
        "float ids": ("input_ids must be integers, got torch.float32", step(torch.ones(2))),
        "ids": (r"input_ids must be in 0 .. 255, got 0 .. 256", step(torch.tensor([0, 256]))),
        "plan": ("plan must be one of .*, got 'fast'", step(IDS[:, 0], plan="fast")),
        "active": (r"active must be bool of shape \(2,\)", step(IDS[:, 0], active=IDS[:, 0])),
        "too long": (r"seen \[3, 3\], and 6 more", forward(IDS)),
        "nothing": ("input_ids must have at least one byte in some row", forward(IDS[:, :0])),
        "lens": ("lens must be in 0 .. 6, got", forward(IDS, lens=torch.tensor([7, 1]))),
        "masks": (
            "boundary_masks must have one entry a stage at most, got 1 more",
            step(IDS[:, 0], boundary_masks=[None, None]),
        ),
        "a mask of three rows": (
            r"shape of the positions of their stage, \(2,\), got \(3,\)",
            step(IDS[:, 0], boundary_masks=[torch.ones(3).bool()]),
        ),
        "a mask of integers": (
            r"tensors of bool, or None, got torch.int64",
            step(IDS[:, 0], boundary_masks=[IDS[:, 0]]),
        ),
        "one mask": (
            "must be a sequence of masks, one a stage, got a tensor",
            step(IDS[:, 0], boundary_masks=IDS > 0),
        ),
        "a short mask": (
            r"shape of the positions of their stage, \(2, 4\), got \(4,\)",
            forward(IDS[:, :4], boundary_masks=[torch.ones(4).bool()]),
        ),
        "a short packed mask": (
            r"shape of the positions of their stage, \(5,\), got \(4,\)",
            forward(
                IDS[0, :5],
                cu_seqlens=torch.tensor([0, 4, 5]),
                boundary_masks=[torch.ones(4).bool()],
            ),
        ),
        "active as a list": ("active must be a tensor", step(IDS[:, 0], active=[True, False])),
        "labels": ("labels must be None with inference_params", forward(IDS, IDS)),
    }


@pytest.mark.parametrize("what", attempts(random_model("one_stage")))
def test_refused(what: str) -> None:
    model = random_model("one_stage")
    message, call = attempts(model)[what]
    cache = model.allocate_inference_cache(2, 8)
    model(IDS[:, :3], inference_params=cache)
    before = [tensor.clone() for tensor in tensors_of(cache)]
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert all(map(torch.equal, before, tensors_of(cache)))


def test_masks_without_a_chunker() -> None:
    model = random_model("isotropic")
    cache = model.allocate_inference_cache(2, 8)
    for call in (model.step, model):
        with pytest.raises(ValueError, match="boundary_masks must be empty: this model has no"):
            call(IDS[:, :1], inference_params=cache, boundary_masks=[IDS[:, 0] > 0])


def test_caches_of_others() -> None:
    model = random_model("one_stage")
    other = random_model("three_stages").allocate_inference_cache(2, 8)
    with pytest.raises(ValueError, match="inference_params must be of this model, got those of an"):
        model.step(IDS[:, 0], other)
    with pytest.raises(ValueError, match="what allocate_inference_cache returned, got dict"):
        model.step(IDS[:, 0], {})
    wide = random_model("one_stage", torch.float32).allocate_inference_cache(2, 8)
    with pytest.raises(ValueError, match=r"dtype of x, torch.float64, got .*float32"):
        model.step(IDS[:, 0], wide)


def test_a_row_that_is_full_does_not_stop_the_others() -> None:
    model = random_model("one_stage")
    cache = model.allocate_inference_cache(2, 8)
    model(IDS, lens=torch.tensor([6, 1]), inference_params=cache)
    model.step(IDS[:, 0], cache)
    model.step(IDS[:, 0], cache)
    active = torch.tensor([False, True])
    for _ in range(5):
        model.step(IDS[:, 0], cache, active=active)
    assert cache.positions.seen.tolist() == [8, 8]
    with pytest.raises(ValueError, match="cache is full"):
        model.step(IDS[:, 0], cache, active=active)


def test_stages_of_a_cached_call_have_decisions_only() -> None:
    model = random_model("one_stage")
    cache = model.allocate_inference_cache(2, 8)
    out = model(IDS, inference_params=cache)
    assert out.loss is None
    assert out.stages[0].probs.shape == out.stages[0].boundary_mask.shape == (2, 6)
    with pytest.raises(ValueError, match="keeps decisions only"):
        _ = out.stages[0].ratio_loss
