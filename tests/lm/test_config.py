"""HNetConfig: official files, presets, round trip, refusals; parameter and FLOP counts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.config import PRESETS
from h_net_dynamic_chunking.flops import flops_per_byte

OFFICIAL: dict[str, Any] = {
    "arch_layout": ["m4", ["T1m4", ["T26"], "m4T1"], "m4"],
    "d_model": [1024, 1024, 1536],
    "d_intermediate": [0, 2816, 4096],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
    "attn_cfg": {
        "num_heads": [16, 16, 16],
        "rotary_emb_dim": [32, 32, 48],
        "window_size": [1023, 1023, -1],
    },
    "tie_embeddings": False,
}


def test_an_official_file_is_the_preset(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(OFFICIAL))
    assert HNetConfig.from_json(tmp_path / "model.json") == HNetConfig.preset("hnet_2stage_L")


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = HNetConfig.preset(name)
    config.to_json(tmp_path / "config.json")
    assert HNetConfig.from_json(tmp_path / "config.json") == config
    config.to_json(tmp_path / "official.json", official=True)
    assert HNetConfig.from_json(tmp_path / "official.json") == config
    assert json.loads((tmp_path / "official.json").read_text()).keys() == OFFICIAL.keys()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("hnet_1stage_L", 679_405_312),
        ("hnet_2stage_L", 874_315_264),
        ("hnet_1stage_XL", 1_270_833_920),
        ("hnet_2stage_XL", 1_603_492_224),
    ],
)
def test_parameters_of_the_published_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert HNetLM(HNetConfig.preset(name)).num_parameters() == parameters


@pytest.mark.parametrize(
    ("name", "positions_per_chunk", "table", "ours"),
    [
        ("hnet_1stage_L", [4.8], 0.43, 0.43340),
        ("hnet_2stage_L", [2.8, 2.5], 0.43, 0.42847),
        ("hnet_1stage_XL", [4.7], 0.72, 0.71550),
        # 0.0001 beyond the 0.01 that the others keep: its chunk lengths are known to two digits.
        ("hnet_2stage_XL", [2.8, 6.9 / 2.8], 0.69, 0.70008),
    ],
)
def test_flops_of_the_published_models(
    name: str, positions_per_chunk: list[float], table: float, ours: float
) -> None:
    """Table 2 of the paper, at the chunk lengths that were reached."""
    got = flops_per_byte(HNetConfig.preset(name), positions_per_chunk=positions_per_chunk) / 1e9
    assert got == pytest.approx(ours, abs=1e-5)
    assert got == pytest.approx(table, abs=0.0101)


def test_create_reasonable_config() -> None:
    config = HNetConfig.create_reasonable_config(D=[512, 768, 1024], arch=["m4", "T1m2", "T9"])
    assert config.arch_layout == ["m4", ["T1m2", ["T9"], "m2T1"], "m4"]
    assert config.stages == 2
    assert config.d_intermediate == (0, 2048, 2816)
    assert config.attn_cfg.num_heads == (8, 12, 16)
    assert config.attn_cfg.window_size == (1023, 1023, -1)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HNetConfig.preset("hnet_1stage_S").vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_layout": ["m4", ["T1"]]}, "arch_layout must be"),
        ({"arch_layout": ["m4", "T1", "m4"]}, "arch_layout must be"),
        ({"arch_layout": 5}, "arch_layout must be"),
        ({"d_model": 5}, "d_model must be a list"),
        ({"d_model": ["a", "b", "c"]}, "d_model must hold numbers"),
        ({"arch_layout": [["T1"]]}, "arch_layout must name its stacks"),
        ({"arch_layout": ["m4", ["T1m4", ["26"], "m4T1"], "m4"]}, "layout must be groups"),
        ({"d_model": [1024, 1024]}, "d_model must have 3 entries"),
        ({"d_model": [1024, 512, 1536]}, "d_model must be positive and never fall"),
        ({"d_intermediate": [0, 0, 4096]}, "d_intermediate must be positive at stage 1"),
        ({"attn_cfg": {"num_heads": [16]}}, "attn_cfg.num_heads must have 3 entries"),
        ({"target_ratio": [1.0, 3.0]}, "target_ratio must be above 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"n_layers": 3}, "unknown entries"),
        ({"ssm_cfg": {"state": 3}}, "ssm_cfg has unknown entries"),
        ({"ssm_cfg": 3}, "ssm_cfg must be a mapping"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HNetConfig.from_dict({**OFFICIAL, **change})


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (("{", "is not JSON"), ("[]", "must hold"), ("{}", "lacks")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            HNetConfig.from_json(path)
    with pytest.raises(ValueError, match="name must be one of hnet_1stage_L"):
        HNetConfig.preset("hnet_3stage_L")
