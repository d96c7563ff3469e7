"""HNetLM against the official implementation's own numbers, fp32 on a CPU.

The files lie beside the checkout, in ../shared/golden, and are not part of the project; without
them these tests are skipped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.checkpoints import read_weights, to_official

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")

MODELS = ["one_stage", "two_stage"]
OFFICIAL_CLAMP = 1e-4


def load(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> HNetLM:
    return HNetLM.from_official(
        GOLDEN / f"{name}.json", GOLDEN / f"{name}.weights.pt", dtype=dtype, **options
    )


def expected(name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)
    return content


def texts(content: dict[str, Any]) -> list[int]:
    return [i for i in range(len(content)) if f"ids_{i}" in content]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("clamp", "tolerance"), [(None, 2e-4), (OFFICIAL_CLAMP, 1e-5)])
def test_logits_masks_and_ratio_losses(name: str, clamp: float | None, tolerance: float) -> None:
    model, want = load(name, smoothing_clamp=clamp), expected(name)
    # The files evaluate the ratio loss at N = 3, whatever the model's own target.
    for i in texts(want):
        with torch.no_grad():
            got = model(want[f"ids_{i}"][None].long())
        assert (got.logits[0] - want[f"logits_{i}"]).abs().max() < tolerance
        for s, stage in enumerate(got.stages):
            assert torch.equal(stage.boundary_mask[0], want[f"mask_{i}_{s}"].flatten().bool())
            assert (stage.probs[0] - want[f"prob_{i}_{s}"].flatten()).abs().max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradient_norms(name: str) -> None:
    model, want = load_with_ratio_3(name), expected(name)
    for i in texts(want):
        with torch.no_grad():
            stages = model(want[f"ids_{i}"][None].long()).stages
        for s, stage in enumerate(stages):
            assert float(stage.ratio_loss) == pytest.approx(float(want[f"ratio_{i}_{s}"]), abs=1e-6)

    ids = want["ids_1"][None].long()
    # The last byte has nothing to predict, but counts in the ratio loss.
    out = model(ids, torch.cat((ids[:, 1:], torch.full((1, 1), -100)), dim=1))
    assert out.cross_entropy is not None
    assert out.loss is not None
    assert out.cross_entropy.item() == pytest.approx(float(want["train_ce"]), abs=1e-5)
    assert out.ratio_loss.item() == pytest.approx(float(want["train_ratio"]), abs=1e-5)
    out.loss.backward()
    gradients = to_official(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        model.config.stages,
    )
    norms = {
        key.removeprefix("gradnorm/"): float(value)
        for key, value in want.items()
        if key.startswith("gradnorm/")
    }
    assert norms.keys() == gradients.keys()
    for key, norm in norms.items():
        assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-9), key


def load_with_ratio_3(name: str) -> HNetLM:
    model = load(name, smoothing_clamp=OFFICIAL_CLAMP)
    for module in model.modules():
        if hasattr(module, "target_avg_token_length"):
            module.target_avg_token_length = 3.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_bf16_with_given_boundaries(name: str) -> None:
    """The error of a bf16 model is that of bf16 weights and arithmetic: small beside the logits."""
    want = expected(name)
    ids = want["ids_0"][None].long()
    stages = load(name).config.stages
    masks = [want[f"mask_0_{s}"].flatten().bool()[None] for s in range(stages)]
    exact = want["logits_0"]
    with torch.no_grad():
        got = load(name, torch.bfloat16)(ids, boundary_masks=masks)
        with torch.autocast("cpu", torch.bfloat16):
            plain = load(name)(ids, boundary_masks=masks)
    error = (got.logits[0].float() - exact).square().mean().sqrt()
    assert error < 2 * (plain.logits[0].float() - exact).square().mean().sqrt()
    for stage, mask in zip(got.stages, masks, strict=True):
        assert torch.equal(stage.boundary_mask, mask)


@pytest.mark.parametrize("name", MODELS)
def test_saved_again_the_official_file_has_the_same_bits(name: str, tmp_path: Path) -> None:
    model = HNetLM.from_official(GOLDEN / f"{name}.json", GOLDEN / f"{name}.weights.pt")
    model.save_official(tmp_path / "again.json", tmp_path / "again.pt")
    first, again = (read_weights(p) for p in (GOLDEN / f"{name}.weights.pt", tmp_path / "again.pt"))
    assert first.keys() == again.keys()
    assert all(same_bits(first[key], again[key]) for key in first)


@pytest.mark.parametrize("preset", ["hnet_1stage_L", "hnet_2stage_XL"])
def test_names_and_shapes_of_the_published_checkpoints(preset: str) -> None:
    published = json.loads((GOLDEN / "official_state_dicts.json").read_text())[preset]
    with torch.device("meta"):
        config = HNetConfig.preset(preset)
        ours = to_official(HNetLM(config).state_dict(), config.stages)
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == {
        key: shape for key, (shape, _) in published.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
