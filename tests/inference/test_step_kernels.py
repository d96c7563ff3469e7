"""A whole step on the kernels for few rows, in Triton's interpreter where there is no GPU.

They run only where every row of a cache steps, and the torch path is the oracle.
"""

import os

import pytest
import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import generate
from h_net_dynamic_chunking.cache import tensors_of
from h_net_dynamic_chunking.layers import fused_step
from h_net_dynamic_chunking.ops.backend import use_backend
from tests.inference.models import random_ids, random_model
from tests.inference.test_parity import feed
from tests.ops.triton_cases import poisoned_memory as poisoned_memory

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter; tests/inference/test_gpu.py is the same on a GPU",
)
pytest.importorskip("triton", reason="needs triton")

# Steps of all rows, steps in which one row waits, and a piece.
PIECES = [[8, 1, 0, 1, 5], [8, 1, 1, 1, 4]]


class Adapted(nn.Linear):
    """A linear layer with something beside its weight, as adapters have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "place",
    [
        "network.layers.0.mlp.fc2",
        "encoder.layers.0.mixer.out_proj",
        "chunker.to_queries_keys",
        "chunker.residual_proj",
    ],
)
def test_changed_layers_run_themselves(place: str, rows: int) -> None:
    model, ids = random_model("one_stage", torch.float32, d_state=16), random_ids(rows, 15)
    model.backbone.get_submodule(place).__class__ = Adapted
    with torch.no_grad():
        want = model(ids)
    with use_backend("triton"):
        got, _ = feed(model, ids, [[8, 1, 1, 5]] * rows, "masked")
    assert float((got - want.logits).abs().max()) < 1e-4


def test_one_row_at_rest_keeps_its_cache() -> None:
    model, ids = random_model("one_stage", torch.float32), random_ids(1, 8)
    cache = model.allocate_inference_cache(1, 9)
    model(ids, inference_params=cache)
    before = [tensor.clone() for tensor in tensors_of(cache.backbone)]
    with use_backend("triton"):
        model.step(ids[:, 0], cache, active=torch.tensor([False]), plan="masked")
    for now, then in zip(tensors_of(cache.backbone), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ["one_stage", "three_stages"])
def test_bfloat16_rows_do_not_depend_on_each_other(name: str) -> None:
    """On the products of several rows: two rows that wait, beside three in lock-step."""
    model = random_model(name, torch.float32, d_state=16).bfloat16()
    prompts = [bytes(row.tolist()) for row in random_ids(3, 6)]
    with use_backend("triton"):
        want = generate(model, prompts, 4, temperature=0, eos=False, plan="masked")
        got = generate(model, prompts[:2], 4, temperature=0, eos=False, plan="waiting")
    assert got == want[:2]


@pytest.mark.parametrize("name", ["one_stage", "isotropic"])
def test_steps_equal_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 within 1e-4, masked, so that rows at rest go through the kernels too."""
    calls = []
    original = fused_step.fused_step

    def counting(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr("h_net_dynamic_chunking.layers.isotropic.fused_step", counting)
    model, ids = random_model(name, torch.float32, d_state=16), random_ids(2, 15)
    with torch.no_grad():
        want = model(ids)
    with use_backend("triton"):
        got, boundaries = feed(model, ids, PIECES, "masked")
    assert float((got - want.logits).abs().max()) < 1e-4
    assert len(calls) == 3 * (2 * model.config.stages + 1)
    for row, stages in enumerate(boundaries):
        for counts, stage in zip(stages, want.stages, strict=True):
            assert int(sum(counts)) == int(stage.boundary_mask[row].sum())
