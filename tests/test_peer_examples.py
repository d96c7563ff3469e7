"""The README examples of other implementations of the H-Net, with the import changed.

In the order of their READMEs; sizes are smaller on a CPU. hnet-impl's example imports
`completion_sync` and never calls it: `generate` takes its place.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking import generate as completion_sync
from h_net_dynamic_chunking.cli import app
from h_net_dynamic_chunking.random_ids import random_jagged_ids as rand_njt_iids
from tests.support import DEVICES

EXAMPLES = Path(__file__).parent.parent / "examples"


def official_files(folder: Path) -> tuple[Path, Path]:
    """Weights and configuration in the official format, of a small model."""
    weights, config = folder / "hnet.pt", folder / "configs" / "hnet.json"
    config.parent.mkdir()
    torch.manual_seed(0)
    HNetLM(HNetConfig.preset("hnet_1stage_S")).save_official(config, weights)
    return weights, config


def test_official_generate(tmp_path: Path) -> None:
    """generate.py --model-path ... --config-path ... --max-tokens N --temperature 1.0 --top-p 1.0

    It asks for prompts on stdin.
    """
    weights, config = official_files(tmp_path)
    command = ["generate", "--model-path", weights, "--config-path", config, "--interactive"]
    options = ["--max-tokens", 16, "--temperature", 1.0, "--top-p", 1.0, "--seed", 0, "--json"]
    arguments = list(map(str, [*command, *options]))
    result = CliRunner().invoke(app, arguments, input="Hello world\n")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["prompt"] == "Hello world"
    assert len(content["logprobs"]) == 16 or content["finish_reason"] == "eos"


def test_hnet_simple_comparison(tmp_path: Path) -> None:
    """comparison.py --model hnet_1stage_L.pt --config configs/hnet_1stage_L.json

    There with the official code in bf16 on a GPU, here with the same weights in float32.
    """
    weights, config = official_files(tmp_path)
    command = ["compare", weights, weights, "--config-a", config, "--config-b", config, "--json"]
    result = CliRunner().invoke(app, list(map(str, [*command, "--prompt", "Hello world, prog"])))
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["prefill"]["a"]["shape"] == [17, 256]
    for phase in ("prefill", "decode"):
        assert 0 < content[phase]["rms"] < 0.05 * content[phase]["a"]["std"]
    assert content["continuation"]


@pytest.mark.parametrize("device", DEVICES)
def test_hnet_impl_usage(device: str) -> None:
    large = device == "cuda"
    D = [512, 1024] if large else [64, 128]
    docs, slen = (16, range(128, 1024)) if large else (4, range(16, 64))

    c = HNetConfig.create_reasonable_config(D=D, arch=["m4", "T9"])
    with torch.device(device):
        m = HNetLM(c).bfloat16()

    # inference
    iids = rand_njt_iids(docs=docs, slen=slen).to(device)
    logits, _ = m(iids)

    assert len(completion_sync(m, "Hello", 4, seed=0)[0]) <= 4

    # training
    lbls = iids.long()  # i.e. torch.randint_like(iids)
    (celoss, _), _extra = m(iids, lbls)

    assert logits.is_nested
    assert logits.values().shape == (iids.values().numel(), 256)
    assert celoss.isfinite()
    celoss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


def test_hnet_impl_letter_repetition(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its example.py: the loss falls, and each report shows the whole text in chunks."""
    monkeypatch.setattr(sys, "argv", ["letter_repetition.py", "--steps", "12"])
    runpy.run_path(str(EXAMPLES / "letter_repetition.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    reports, texts = lines[::2], lines[1::2]
    losses = [float(line.split("cross entropy ")[1].split(",")[0]) for line in reports]
    assert losses[-1] < losses[0] - 0.5
    assert all("ratio loss" in line and "bytes per chunk" in line for line in reports)
    plain = {text.replace("][", "").strip("[]") for text in texts}
    assert len(plain) == 1
    assert list(plain.pop()) == sorted(text for text in texts[0] if text not in "[]")
