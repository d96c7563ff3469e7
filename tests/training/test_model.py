"""The byte-level model: configuration, initialisation, parameter groups, evaluation and samples."""

import gzip
import json
import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from h_net_dynamic_chunking.scaling import lr_multipliers
from h_net_dynamic_chunking.training.config import Config
from h_net_dynamic_chunking.training.evaluation import evaluate, gzip_bpb
from h_net_dynamic_chunking.training.mixers import heads_for
from h_net_dynamic_chunking.training.model import ByteHNet, Prediction
from h_net_dynamic_chunking.training.optimizer import build_optimizer
from h_net_dynamic_chunking.training.samples import LEGEND, marked, samples_text

TEXT = torch.tensor(list("Ein naïver Text — mit Zeichen.".encode() * 4), dtype=torch.uint8)


@pytest.fixture
def model(tiny_config: Config) -> ByteHNet:
    torch.manual_seed(0)
    return ByteHNet(tiny_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": 2**63}, "seed"),
        ({"dims": (32, 0, 64)}, "dims"),
        ({"target_ratio": (3.0, 1.0)}, "target_ratio"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"ratio_loss_weight": -1.0}, "ratio_loss_weight"),
        ({"mamba": "cuda"}, "mamba is 'cuda'"),
        ({"attention": "cuda"}, "attention is 'cuda'"),
        (
            {"dims": (32, 16, 64)},
            r"dims is \(32, 16, 64\); twice each of a stage with Mamba-2 must be a multiple of 64, "
            r"the width of a Mamba-2 head, which 2 \* 16 is not",
        ),
        ({"layouts": ("m1", "x1", "T1")}, "layout"),
    ],
)
def test_impossible_sizes_are_named(
    tiny_config: Config, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ByteHNet(replace(tiny_config, **change))


def test_config_survives_json(tiny_config: Config) -> None:
    text = json.dumps({**tiny_config.to_json(), "something": "else"})
    assert Config.from_settings(json.loads(text)) == tiny_config


@pytest.mark.parametrize(
    ("change", "package"),
    [
        ({"mamba": "mamba-ssm"}, "mamba-ssm"),
        ({"attention": "flash-attn"}, "flash-attn"),
        ({"attention": "x-transformers"}, "x-transformers"),
    ],
)
def test_a_missing_library_is_named_as_pip_knows_it(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], package: str
) -> None:
    # The modules inside, too: another test may have imported them.
    for name in ("mamba_ssm", "flash_attn.modules.mha", "x_transformers.x_transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        ByteHNet(replace(tiny_config, **change))


def test_installed_libraries_are_plugged_in(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the constructors of the real libraries show where each one ends up."""

    class Theirs(nn.Linear):
        def __init__(self, d_model: int, **options: Any) -> None:
            super().__init__(d_model, d_model)
            self.options = options

    mamba_ssm, x_transformers = ModuleType("mamba_ssm"), ModuleType("x_transformers")
    monkeypatch.setattr(mamba_ssm, "Mamba2", Theirs, raising=False)
    monkeypatch.setattr(x_transformers, "Attention", Theirs, raising=False)
    monkeypatch.setitem(sys.modules, "mamba_ssm", mamba_ssm)
    monkeypatch.setitem(sys.modules, "x_transformers", x_transformers)
    monkeypatch.setitem(sys.modules, "x_transformers.x_transformers", x_transformers)
    model = ByteHNet(replace(tiny_config, mamba="mamba-ssm", attention="x-transformers"))
    options = [module.options for module in model.modules() if isinstance(module, Theirs)]
    assert [set(chosen) for chosen in options] == [
        {"d_state", "headdim"},
        {"d_state", "headdim"},
        {"heads", "dim_head", "causal", "flash"},
        {"d_state", "headdim"},
        {"d_state", "headdim"},
    ]
    assert model(TEXT[None, :32].long()).logits.shape == (1, 32, 256)


def test_heads_divide_the_width() -> None:
    assert [heads_for(width) for width in (32, 64, 192, 200, 256)] == [1, 1, 3, 2, 4]


def test_a_prediction_reports_chunks_in_bytes(model: ByteHNet) -> None:
    prediction = model(TEXT[:64].long().view(2, 32))
    assert prediction.logits.shape == (2, 32, 256)
    for count, lens in zip(prediction.chunk_counts, prediction.chunk_lens, strict=True):
        assert count == (lens > 0).sum()
        assert lens.sum(dim=1).tolist() == [32, 32]
    outer, inner = prediction.chunk_counts
    assert outer >= inner
    assert prediction.weighted_ratio_loss.item() == pytest.approx(
        Config.ratio_loss_weight * prediction.ratio_loss.item()
    )


def test_projections_onto_the_stream_start_smaller_deeper_down(model: ByteHNet) -> None:
    # m1 twice adds 2 on stage 0, as many on stage 1, and T1 adds 2 more inside.
    (outer, _), (middle, _), (main,) = model.stacks()
    for stack, additions in ((outer, 2), (middle, 4), (main, 6)):
        weights = [m.weight for name, m in stack.named_modules() if name.endswith("out_proj")]
        for weight in weights:
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(additions), rel=0.1)


def test_every_parameter_has_one_group_with_the_rate_of_its_stage(
    model: ByteHNet, tiny_config: Config
) -> None:
    groups = build_optimizer(model, tiny_config).param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}

    # Eq. (11) by hand: widths 32, 32, 64 and ratios 3, 2.
    outer, middle, main = lr_multipliers(tiny_config.dims, tiny_config.target_ratio)
    assert outer == pytest.approx(math.sqrt(4.6 * 2))
    assert middle == pytest.approx(math.sqrt(4.6 / 3 * 2))
    assert main == pytest.approx(math.sqrt(4.6 / 6))
    for module, multiplier in (
        (model.embedding, outer),
        (model.head, outer),
        (model.hnet.chunker, outer),
        (model.inner.encoder, middle),
        (model.inner.chunker, middle),
        (model.inner.network, main),
    ):
        assert {by_id[id(p)]["lr_multiplier"] for p in module.parameters()} == {multiplier}

    for name, parameter in model.named_parameters():
        decays = by_id[id(parameter)]["weight_decay"] > 0
        one_of_those_that_must_not = name.endswith(("bias", "A_log", "D")) or "norm" in name
        assert decays == (parameter.ndim > 1)
        assert not (decays and one_of_those_that_must_not), name


def test_evaluation_is_the_mean_over_all_predicted_bytes(model: ByteHNet) -> None:
    whole = evaluate(model, TEXT[:33], batch_size=2, seq_len=32)
    prediction: Prediction = model(TEXT[None, :32].long())
    assert whole.bpb == pytest.approx(prediction.bits_per_byte(TEXT[None, 1:33].long()).item())
    assert whole.bytes_per_chunk == [32 / int(count) for count in prediction.chunk_counts]
    assert model.training

    # A shorter last window counts by its bytes.
    longer = evaluate(model, TEXT[:41], batch_size=2, seq_len=32)
    tail = evaluate(model, TEXT[32:41], batch_size=2, seq_len=32)
    assert longer.bpb == pytest.approx((32 * whole.bpb + 8 * tail.bpb) / 40)


def test_gzip_bits_per_byte() -> None:
    assert gzip_bpb(TEXT) == 8 * len(gzip.compress(bytes(TEXT.tolist()), 9)) / len(TEXT)


def test_samples_mark_the_chunks_and_are_text(model: ByteHNet) -> None:
    state = torch.get_rng_state()
    text = samples_text(model, TEXT, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert text == samples_text(model, TEXT, seed=0)
    assert text.splitlines()[0] == LEGEND
    assert text.encode("utf-8").decode("utf-8") == text


def test_marks_stand_where_chunks_open(model: ByteHNet) -> None:
    content = torch.tensor(list(b"plain ascii text without marks"))
    lens = model(content[None]).chunk_lens
    text = marked(model, content)
    assert text[0] == "┃"
    assert text.count("┃") == int((lens[1] > 0).sum())
    assert text.count("┃") + text.count("·") == int((lens[0] > 0).sum())
    pieces = text.replace("┃", "·").split("·")[1:]
    assert [len(piece) for piece in pieces] == lens[0][lens[0] > 0].tolist()
    assert "".join(pieces).encode() == bytes(content.tolist())
