"""HNetConfig: official files, presets, round trip, refusals; parameter and FLOP counts."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.config import PRESETS, AttentionConfig
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


# Table 2 of the paper, in GFLOPs a byte, and the bytes per innermost chunk of its table 1.
PUBLISHED = [
    ("hnet_1stage_L", 4.8, 0.43),
    ("hnet_2stage_L", 7.0, 0.43),
    ("hnet_1stage_XL", 4.7, 0.72),
    ("hnet_2stage_XL", 6.9, 0.69),
]


def gflops_in_the_table(name: str, bytes_per_chunk: float) -> float:
    """Counted as in the table, at so many bytes per innermost chunk."""
    config = HNetConfig.preset(name)
    # Where the paper shows how two stages share the work (Fig. 7, 2-stage L), stage 0 keeps 0.357.
    outer = (1 / 0.357,) if config.stages == 2 else ()
    ratios = (*outer, bytes_per_chunk / math.prod(outer))
    return flops_per_byte(config, positions_per_chunk=ratios, window_squared=True) / 1e9


@pytest.mark.parametrize(("name", "bytes_per_chunk", "table"), PUBLISHED)
def test_flops_of_the_published_models(name: str, bytes_per_chunk: float, table: float) -> None:
    """Within 0.01 of the table, and its two digits for some length that is printed alike."""
    assert gflops_in_the_table(name, bytes_per_chunk) == pytest.approx(table, abs=0.01)
    fewest, most = (gflops_in_the_table(name, bytes_per_chunk + d) for d in (0.05, -0.05))
    assert fewest < table + 0.005
    assert most > table - 0.005


@pytest.mark.parametrize(
    ("layout", "window", "table", "ours"),
    [
        ("T16", 1023, 0.42, 0.4207),  # LlamaByte
        ("T16", -1, 0.95, 0.9553),  # LlamaByte (Global)
        ("m28", -1, 0.42, 0.4143),  # MambaByte
    ],
)
def test_flops_of_the_isotropic_models(layout: str, window: int, table: float, ours: float) -> None:
    attention = AttentionConfig((16,), (32,), (window,))
    config = HNetConfig([layout], (1024,), (2816,), attn_cfg=attention)
    got = flops_per_byte(config, window_squared=True) / 1e9
    assert got == pytest.approx(ours, abs=1e-4)
    assert got == pytest.approx(table, abs=0.01)
    # By default each position pays for the window that it reads.
    assert flops_per_byte(config) / 1e9 == pytest.approx(0.4801 if window > 0 else got, abs=1e-4)


def test_flops_by_hand() -> None:
    """One layer T of width 64 on 8 positions: the sums of the appendix, term by term."""
    attention = AttentionConfig((2,), (0,), (3,))
    config = HNetConfig(["T1"], (64,), (100,), vocab_size=10, attn_cfg=attention)
    n, d, ffw = 8, 64, 128  # 100 is rounded up to 128
    by_hand = 2 * n * 10 * d * 2 + 2 * 4 * n * d * d + n * d * (6 * ffw + 5)
    assert flops_per_byte(config, n) == (by_hand + (4 * d + 3 * 2) * n * 4) / n
    assert flops_per_byte(config, n, window_squared=True) == (by_hand + (4 * d + 6) * 4 * 4) / n
    assert flops_per_byte(config, 3) == flops_per_byte(config, 3, window_squared=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len must be an integer of at least 1, got 0"),
        ({"seq_len": 8192.0}, "seq_len must be an integer"),
        ({"positions_per_chunk": []}, "positions_per_chunk must have 1 entries"),
        ({"positions_per_chunk": [0.5]}, "of at least 1, got .0.5."),
        ({"positions_per_chunk": [float("nan")]}, "of at least 1, got .nan."),
    ],
)
def test_flops_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flops_per_byte(HNetConfig.preset("hnet_1stage_L"), **arguments)


def test_create_reasonable_config() -> None:
    config = HNetConfig.create_reasonable_config(D=[512, 768, 1024], arch=["m4", "T1m2", "T9"])
    assert config.arch_layout == ("m4", ("T1m2", ("T9",), "m2T1"), "m4")
    assert config.stages == 2
    assert config.d_intermediate == (0, 2048, 2816)
    assert config.attn_cfg.num_heads == (8, 12, 16)
    assert config.attn_cfg.window_size == (1023, 1023, -1)


def test_is_frozen_and_hashable() -> None:
    config = HNetConfig.preset("hnet_2stage_S")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]
    assert {config: 1}[HNetConfig.from_dict(config.to_dict())] == 1
    assert config.to_dict()["arch_layout"] == ["m2", ["T1m1", ["T4"], "m1T1"], "m2"]


def test_what_the_official_format_lacks_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = HNetConfig.from_dict({**OFFICIAL, "ratio_loss_weight": 0.5, "smoothing_clamp": 1e-4})
    config.to_json(path)
    assert HNetConfig.from_json(path) == config
    content = json.loads(path.read_text())
    # As files were written before these entries existed.
    del content["ratio_loss_weight"], content["smoothing_clamp"]
    path.write_text(json.dumps(content))
    assert HNetConfig.from_json(path) == HNetConfig.from_dict(OFFICIAL)
    config.to_json(path, official=True)
    assert json.loads(path.read_text()) == OFFICIAL


def test_only_what_a_stage_uses_is_required_of_it() -> None:
    """Stage 0 is Mamba-2 alone, the rest attention alone."""
    attention = {"num_heads": [7, 4, 4], "rotary_emb_dim": [99, 16, 0], "window_size": [-9, 0, -1]}
    content = {"arch_layout": ["m1", ["t1", ["T1"], "t1"], "m1"], "d_model": [64, 72, 100]}
    content |= {"d_intermediate": [-1, 0, 1], "attn_cfg": attention}
    HNetLM(HNetConfig.from_dict(content))
    unused = {"ssm_cfg": {"d_state": 0, "expand": 0}, "d_model": [7], "arch_layout": ["t1"]}
    HNetConfig.from_dict({**unused, "attn_cfg": {"num_heads": [7]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_layout": ["m4", ["T1"]]}, "arch_layout must be"),
        ({"arch_layout": ["m4", "T1", "m4"]}, "arch_layout must be"),
        ({"arch_layout": 5}, "arch_layout must be"),
        ({"arch_layout": [["T1"]]}, "arch_layout must name its stacks"),
        (
            {"arch_layout": ["m4", ["T1m4", ["26"], "m4T1"], "m4"]},
            "arch_layout: layout must be groups",
        ),
        (
            {"arch_layout": ["m4", ["T1m4", ["X2"], "m4T1"], "m4"]},
            r"arch_layout .* got 'X' in 'X2'",
        ),
        ({"d_model": 5}, "d_model must be a list"),
        ({"d_model": [1024, 1024]}, "d_model must have 3 entries"),
        ({"d_model": ["a", "b", "c"]}, r"d_model\[0\] must be an integer of at least 1, got 'a'"),
        ({"d_model": [1024, 1024.0, 1536]}, r"d_model\[1\] must be an integer .* got 1024\.0"),
        ({"d_model": [True, 1024, 1536]}, r"d_model\[0\] must be an integer .* got True"),
        ({"d_model": [1024, 512, 1536]}, "d_model must never fall"),
        ({"d_intermediate": [0, 0, 4096]}, r"d_intermediate\[1\] must be an integer of at least 1"),
        ({"d_intermediate": [0.5, 2816, 4096]}, r"d_intermediate\[0\] must be an integer"),
        ({"attn_cfg": {"num_heads": [16]}}, r"attn_cfg\.num_heads must have 3 entries"),
        (
            {"attn_cfg": {"num_heads": [16, 7, 16]}},
            r"num_heads\[1\] must be a divisor .* 1024, got 7",
        ),
        ({"attn_cfg": {"num_heads": [16, 0, 16]}}, r"num_heads\[1\] must be .* at least 1, got 0"),
        ({"attn_cfg": {"rotary_emb_dim": [32, 31, 48]}}, r"rotary_emb_dim\[1\] must be even"),
        (
            {"attn_cfg": {"rotary_emb_dim": [32, 32, 98]}},
            r"rotary_emb_dim\[2\] must be .* 0 \.\. 96",
        ),
        ({"attn_cfg": {"rotary_emb_dim": [32, -2, 48]}}, r"rotary_emb_dim\[1\] must be even and"),
        ({"attn_cfg": {"window_size": [1023, -2, -1]}}, r"window_size\[1\] must be .* least -1"),
        ({"attn_cfg": {"window_size": [1023, None, -1]}}, r"window_size\[1\] must be an integer"),
        ({"ssm_cfg": {"d_state": 0}}, r"ssm_cfg\.d_state must be an integer of at least 1, got 0"),
        ({"ssm_cfg": {"d_conv": 0}}, r"ssm_cfg\.d_conv must be"),
        ({"ssm_cfg": {"expand": 1.5}}, r"ssm_cfg\.expand must be an integer, got 1\.5"),
        ({"ssm_cfg": {"chunk_size": "256"}}, r"ssm_cfg\.chunk_size must be an integer"),
        (
            {"d_model": [1000, 1024, 1536]},
            r"ssm_cfg\.expand \* d_model\[0\] must be a multiple of 64",
        ),
        ({"ssm_cfg": {"state": 3}}, "ssm_cfg has unknown entries"),
        ({"ssm_cfg": 3}, "ssm_cfg must be a mapping"),
        ({"target_ratio": [1.0, 3.0]}, r"target_ratio\[0\] must be a finite number above 1"),
        ({"target_ratio": [3.0, float("nan")]}, r"target_ratio\[1\] must be .* got nan"),
        ({"target_ratio": [3.0, float("inf")]}, r"target_ratio\[1\] must be .* got inf"),
        ({"target_ratio": [True, 3.0]}, r"target_ratio\[0\] must be .* got True"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1"),
        ({"vocab_size": "256"}, "vocab_size must be an integer of at least 1, got '256'"),
        ({"tie_embeddings": "false"}, "tie_embeddings must be true or false, got 'false'"),
        ({"ratio_loss_weight": -0.1}, "ratio_loss_weight must be a finite number of at least 0"),
        ({"smoothing_clamp": 0.5}, r"smoothing_clamp must be a number in \[0, 0\.5\)"),
        ({"smoothing_clamp": None}, "smoothing_clamp must be a number"),
        ({"n_layers": 3}, "unknown entries"),
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
    path.write_text(json.dumps({**OFFICIAL, "vocab_size": 0}))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size must be"):
        HNetConfig.from_json(path)
    with pytest.raises(ValueError, match="config must be an HNetConfig, got dict"):
        HNetLM(OFFICIAL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ssm_cfg must be an SSMConfig, got dict"):
        HNetConfig(["m1"], (64,), ssm_cfg={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"D\[0\] must be an integer of at least 1, got 0"):
        HNetConfig.create_reasonable_config(D=[0], arch=["m1"])
    for arguments, said in (
        ({"D": 64, "arch": "T1"}, "D must be a list with one entry a level, got 64"),
        ({"D": [64], "arch": "T1"}, "arch must be a list with one entry a level, got 'T1'"),
        ({"D": [64, 64], "arch": [1, "T1"]}, r'arch\[0\] must be a layout such as "m4", got 1'),
    ):
        with pytest.raises(ValueError, match=said):
            HNetConfig.create_reasonable_config(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must be one of hnet_1stage_L"):
        HNetConfig.preset("hnet_3stage_L")
