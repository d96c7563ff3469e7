"""The command `hnet`: each command on tiny models, and one sentence for each bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.checkpoints import read_weights
from h_net_dynamic_chunking.cli import app
from h_net_dynamic_chunking.cli.info import Sizes
from h_net_dynamic_chunking.comparison import compare
from h_net_dynamic_chunking.config import PRESETS
from h_net_dynamic_chunking.training.config import Config
from h_net_dynamic_chunking.training.folder import RunFolder

CONFIG = HNetConfig.create_reasonable_config(D=[32, 32, 64], arch=["m1", "T1m1", "T1"])
FEW = ["--prompt", "héllo, wörld", "--new-bytes", "3"]
MAIN = "from h_net_dynamic_chunking.cli import main; main()"


def tiny(seed: int = 0, config: HNetConfig = CONFIG) -> HNetLM:
    torch.manual_seed(seed)
    return HNetLM(config)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """tiny.pt in the official format, of two dtypes, and tiny.json beside it."""
    model = tiny().bfloat16()
    model.lm_head.float()
    model.save_official(tmp_path / "tiny.json", tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def hnet(*args: object) -> str:
    """What the command prints; it must succeed."""
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def hnet_json(*args: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(hnet(*args, "--json"))
    return content


def complaint(*args: object) -> str:
    """The one line that the command says on stderr; it must fail with status 2."""
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hnet: ")
    return line


def assert_same_bits(got: Path, want: Path) -> None:
    """Two official .pt files hold the same tensors under the same keys."""
    found, wanted = read_weights(got), read_weights(want)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", PRESETS)
def test_levels_add_up_to_all_parameters(name: str) -> None:
    with torch.device("meta"):
        sizes = Sizes.of(HNetLM(PRESETS[name]))
    assert sum(level.parameters for level in sizes.levels) == sizes.parameters


def test_info_of_a_preset() -> None:
    out = hnet("info", "hnet_2stage_XL")
    rows = [line.split() for line in out.splitlines()]
    assert ["stage", "1", "1536", "T1m4", "/", "m4T1", "180,865,152", "3"] in rows
    assert ["main", "network", "2048", "T27", "1,366,145,536"] in rows
    assert ["parameters", "1,603,492,224"] in rows
    assert "FLOPs per byte     0.583 G forward, 8192 bytes in a sequence" in out


def test_info_is_the_same_of_a_directory_and_of_its_json(directory: Path) -> None:
    content = hnet_json("info", directory)
    assert content == hnet_json("info", directory / "config.json")
    assert content["parameters"] == tiny().num_parameters()
    assert content["flops_per_byte"] == tiny().flops_per_byte(seq_len=content["seq_len"])
    assert [level["width"] for level in content["levels"]] == [32, 32, 64]
    assert [level["target_ratio"] for level in content["levels"]] == [3.0, 3.0, None]


def test_info_checks_weights(official: Path) -> None:
    json_file = official.with_suffix(".json")
    assert hnet_json("info", json_file, "--weights", official)["weights"] == {
        "path": str(official),
        "size": official.stat().st_size,
        "dtypes": ["bfloat16", "float32"],
    }
    assert f"{official} fits" in hnet("info", json_file, "--weights", official)
    assert "does not fit" in complaint("info", "hnet_1stage_S", "--weights", official)


def test_convert_there_and_back_keeps_every_bit(official: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "new" / "tiny", tmp_path / "other" / "again.pt"
    out = hnet("convert", official, there)
    assert {file.name for file in there.iterdir()} == {"config.json", "model.safetensors"}
    assert all(f"wrote {file}, " in out for file in there.iterdir())

    out = hnet("convert", there, back)
    assert {file.name for file in back.parent.iterdir()} == {"again.json", "again.pt"}
    assert all(f"wrote {file}, " in out for file in back.parent.iterdir())
    assert_same_bits(back, official)
    assert back.with_suffix(".json").read_text() == official.with_suffix(".json").read_text()


def test_convert_takes_a_configuration_from_elsewhere(official: Path, tmp_path: Path) -> None:
    elsewhere = official.with_suffix(".json").rename(tmp_path / "elsewhere.json")
    assert "needs a configuration" in complaint("convert", official, tmp_path / "tiny")
    hnet("convert", official, tmp_path / "tiny", "--config", elsewhere)
    assert HNetLM.from_pretrained(tmp_path / "tiny").config == CONFIG


@pytest.mark.parametrize("name", ["tiny.pt", "tiny.json"])
def test_convert_overwrites_only_when_told(directory: Path, tmp_path: Path, name: str) -> None:
    present = tmp_path / name
    present.write_text("precious")
    line = complaint("convert", directory, tmp_path / "tiny.pt")
    assert f"{present} would be replaced" in line
    assert "--overwrite" in line
    assert present.read_text() == "precious"
    hnet("convert", directory, tmp_path / "tiny.pt", "--overwrite")
    HNetLM.from_official(tmp_path / "tiny.json", tmp_path / "tiny.pt")


@pytest.mark.parametrize("source", ["tiny", "tiny.pt"])
def test_convert_without_space_changes_nothing(
    official: Path, directory: Path, tmp_path: Path, source: str
) -> None:
    """In a process whose files may have 20 kB, less than the weights, more than a configuration."""
    pytest.importorskip("resource")
    new = tmp_path / "new"
    new.mkdir()
    destination = new if source == official.name else new / "made.pt"
    names = ["config.json", "model.safetensors", "made.json", "made.pt"]
    for name in names:
        (new / name).write_text("old")
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    )
    command = ["convert", str(tmp_path / source), str(destination), "--overwrite"]
    result = process(limit + MAIN, *command)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"hnet: .* cannot be written \(.*File too large.*\)\n", result.stderr)
    assert {file.name: file.read_text() for file in new.iterdir()} == dict.fromkeys(names, "old")


def test_compare_of_a_model_with_itself(official: Path) -> None:
    content = hnet_json("compare", official, official, "--dtype-b", "float32", *FEW)
    length = len(FEW[1].encode())
    for phase, positions in (("prefill", length), ("decode", 3)):
        difference = content[phase]
        assert difference["a"] == difference["b"]
        assert difference["a"]["shape"] == [positions, 256]
        assert difference["max_abs"] == difference["rms"] == 0
        assert difference["same_boundaries"] == [1, 1]
        assert difference["same_greedy_bytes"] == 1


def test_compare_of_two_dtypes(directory: Path) -> None:
    content = hnet_json("compare", directory, directory, *FEW)
    for phase in ("prefill", "decode"):
        difference = content[phase]
        assert (difference["a"]["dtype"], difference["b"]["dtype"]) == ("float32", "bfloat16")
        assert 0 < difference["rms"] < difference["max_abs"] < 0.2


def test_compare_with_the_official_clamp(official: Path, directory: Path) -> None:
    """The clamp is a difference of its own, for a model from anywhere."""
    for model in ("hnet_1stage_S", official, directory):
        command = ["compare", model, model, "--dtype-b", "float32", "--new-bytes", 1]
        assert hnet_json(*command, "--clamp-b", "0")["prefill"]["max_abs"] == 0
        assert 0 < hnet_json(*command, "--clamp-b", "0.01")["prefill"]["max_abs"] < 1
        assert hnet_json(*command, "--clamp-a", 1e-4, "--clamp-b", 1e-4)["prefill"]["max_abs"] == 0
    out = hnet("compare", directory, directory, *FEW, "--clamp-b", "1e-4")
    assert f"A  {directory}, its own weights, float32 on cpu\n" in out
    assert f"B  {directory}, its own weights, bfloat16 on cpu, clamp 0.0001\n" in out
    line = complaint("compare", directory, directory, "--clamp-a", "0.5")
    assert "smoothing_clamp must be a number in [0, 0.5), got 0.5" in line


def test_compare_as_tables(directory: Path) -> None:
    out = hnet("compare", "hnet_1stage_S", directory, *FEW, "--seed", 7)
    assert "A  hnet_1stage_S, random weights of seed 7, float32 on cpu" in out
    assert f"B  {directory}, its own weights, bfloat16 on cpu" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["prefill", "A", "14", "x", "256", "float32"] in [row[:6] for row in rows]
    assert ["decode", "B", "3", "x", "256", "bfloat16"] in [row[:6] for row in rows]
    # One model has one stage, the other two: they share the first.
    assert sum(row[:2] == ["same", "boundaries,"] for row in rows) == 1
    assert "continuation of A: '" in out


def test_the_seed_alone_chooses_the_weights_of_a_preset() -> None:
    command = ["compare", "hnet_1stage_S", "hnet_1stage_S", "--dtype-b", "float32", *FEW]
    content = hnet_json(*command)
    assert content["prefill"]["max_abs"] == 0
    assert hnet_json(*command, "--seed", 0) == content
    assert hnet_json(*command, "--seed", 1)["prefill"]["a"] != content["prefill"]["a"]


def test_prompt_file_is_read_byte_for_byte(directory: Path, tmp_path: Path) -> None:
    """Also where it is not UTF-8."""
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"\xff\x00\r\n")
    content = hnet_json("compare", directory, directory, "--file", prompt, "--new-bytes", 1)
    assert content["prefill"]["a"]["shape"] == [4, 256]


def test_comparison_against_forwards_by_hand() -> None:
    """Both models read what the first one chose; boundaries are compared by the byte they cut."""
    a, b = tiny(seed=0), tiny(seed=1)
    prompt = b"dynamic chunking"
    got = compare(a, b, prompt, new_bytes=4)
    text = prompt + got.continuation
    with torch.no_grad():
        out_a, out_b = (model(torch.tensor([list(text[:-1])])) for model in (a, b))
    first = len(prompt) - 1
    # The model is causal: one forward over the whole text has the logits of every step.
    choices = out_a.logits[0, first:].argmax(-1)
    assert bytes(choices.tolist()) == got.continuation
    error = (out_a.logits - out_b.logits)[0, first:].double()
    assert got.decode.max_abs == pytest.approx(float(error.abs().max()), abs=1e-5)
    assert got.decode.rms == pytest.approx(float(error.square().mean().sqrt()), abs=1e-5)
    same = (choices == out_b.logits[0, first:].argmax(-1)).float().mean()
    assert got.decode.same_greedy_bytes == pytest.approx(float(same))
    for stage, share in enumerate(got.decode.same_boundaries):
        starts = [chunk_starts(out.stages[stage]) for out in (out_a, out_b)]
        assert share == len(starts[0] & starts[1]) / len(starts[0] | starts[1])


def chunk_starts(stage: Any) -> set[int]:
    """The bytes at which the chunks of a stage start, from their lengths in bytes."""
    lens = stage.intermediates.absolute_chunk_lens[0]
    return set((lens.cumsum(0) - lens).tolist())


def test_comparison_refuses_other_vocabularies_and_empty_texts() -> None:
    letters = HNetConfig(["m1"], d_model=(32,), vocab_size=26)
    with pytest.raises(ValueError, match="b must have a vocabulary of 256 bytes, got 26"):
        compare(tiny(), tiny(config=letters), b"text", 1)
    with pytest.raises(ValueError, match="at least one byte"):
        compare(tiny(), tiny(), b"", 1)
    with pytest.raises(ValueError, match="new_bytes must be at least 1, got 0"):
        compare(tiny(), tiny(), b"text", 0)


def test_bad_models_are_named(official: Path, directory: Path, tmp_path: Path) -> None:
    absent, json_file = tmp_path / "absent", official.with_suffix(".json")
    (tmp_path / "truncated.pt").write_bytes(official.read_bytes()[:1000])
    assert "hnet_1stage_L" in complaint("info", "hnet_3stage_L")
    assert "config.json" in complaint("info", tmp_path)
    (tmp_path / "config.json").write_text('{"arch_layout": ["t1"], "d_model": [1000]}')
    line = complaint("info", tmp_path)
    assert "config.json: attn_cfg.num_heads[0] must be a divisor of d_model[0] = 1000" in line
    (tmp_path / "config.json").unlink()
    assert "is not JSON" in complaint("info", official)
    for destination in ("new", "new.pt"):
        line = complaint("convert", absent, tmp_path / destination)
        assert line == f"hnet: SOURCE: {absent} does not exist"
    line = complaint("convert", official, json_file)
    assert f"DESTINATION must be a new directory or a .pt, got the file {json_file}" in line
    assert "directory" in complaint("convert", official, tmp_path / "new.pt")
    assert "official .pt" in complaint("convert", directory, tmp_path / "new")
    line = complaint("convert", directory, tmp_path / "new.pt", "--config", json_file)
    assert "holds its own configuration" in line
    line = complaint("convert", tmp_path / "truncated.pt", tmp_path / "new", "--config", json_file)
    assert "truncated" in line
    assert not (tmp_path / "new").exists()


def test_runs_of_train_are_no_models(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_settings({**Config().to_json(), "steps": 1})
    run.checkpoint.touch()
    said = f"hnet: {run.path} is a run folder of train.py, whose model hnet does not read"
    for model in (run.path, run.checkpoint):
        assert complaint("generate", "--model", model, "--prompt", "a") == said
    for model in (run.path, run.config):
        assert complaint("info", model) == said
    assert complaint("compare", run.path, "hnet_1stage_S") == said
    for source, destination in ((run.path, "new.pt"), (run.checkpoint, "new")):
        assert complaint("convert", source, tmp_path / destination) == said
        assert not (tmp_path / destination).exists()


def test_bad_comparisons_are_named(official: Path, directory: Path, tmp_path: Path) -> None:
    json_file = official.with_suffix(".json")
    assert "no preset" in complaint("compare", directory, tmp_path / "absent")
    assert "of no use" in complaint("compare", directory, directory, "--config-b", json_file)
    line = complaint("compare", directory, directory, "--prompt", "x", "--file", json_file)
    assert "exclude each other" in line
    assert "at least one byte" in complaint("compare", directory, directory, "--prompt", "")
    for device in ("abacus", "meta"):
        line = complaint("compare", directory, directory, "--device-b", device)
        assert f"device: '{device}' cannot be used here" in line


@pytest.mark.parametrize(
    "args",
    [
        ["info"],
        ["inform", "hnet_1stage_L"],
        ["compare", "hnet_1stage_S", "hnet_1stage_S", "--dtype-a", "int8"],
        ["compare", "hnet_1stage_S", "hnet_1stage_S", "--new-bytes", "0"],
        ["compare", "hnet_1stage_S", "hnet_1stage_S", "--file", "absent"],
    ],
    ids=" ".join,
)
def test_bad_usage_has_status_2(args: list[str]) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def process(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_in_a_process_of_its_own() -> None:
    result = process(MAIN, "info", "hnet_1stage_L")
    assert (result.returncode, result.stderr) == (0, "")
    assert "679,405,312" in result.stdout


def test_missing_extra_is_named() -> None:
    result = process("import sys; sys.modules['typer'] = None\n" + MAIN, "info", "hnet_1stage_L")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("hnet: typer is missing: pip install 'h-net-dynamic-chunking[cli]'\n")


def test_an_official_file_named_like_a_preset_needs_no_configuration(tmp_path: Path) -> None:
    weights = tmp_path / "hnet_1stage_S.pt"
    tiny(config=PRESETS["hnet_1stage_S"]).save_official(tmp_path / "other.json", weights)
    hnet("convert", weights, tmp_path / "made")
    assert HNetConfig.from_json(tmp_path / "made" / "config.json") == PRESETS["hnet_1stage_S"]
