"""`hnet generate` on scripted models, `hnet chunks` on tiny ones: text, colours, JSON, failures."""

import base64
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from h_net_dynamic_chunking import HNetLM
from h_net_dynamic_chunking.cli import app
from h_net_dynamic_chunking.visualize import bracketed
from tests.generation.mock_model import BOS, MockModel, scripted
from tests.test_cli import CONFIG, MAIN, complaint, hnet, process, tiny

TEXTS = {
    "One": b" word. Two \xc3\xa9!",
    "né": b" oui",
    "stop": b" a STOP b",
    "\udcff": b"\xe6\xbc",
    "esc": b"\x1b[2J",
}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
TERMINAL: dict[str, str | None] = {
    "FORCE_COLOR": "1",
    "TERM": "xterm-256color",
    "COLORTERM": "truecolor",
    "NO_COLOR": None,
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MockModel:
    """Whatever --model says; the arguments that it is loaded with are in `.asked`."""
    mock = scripted(**TEXTS)
    module = importlib.import_module("h_net_dynamic_chunking.cli.generate")

    def load_model(*asked: Any) -> MockModel:
        mock.asked = asked
        return mock

    monkeypatch.setattr(module, "load_model", load_model)
    return mock


def generate(*args: object) -> str:
    return hnet("generate", "--model", "any", *args)


def generate_json(*args: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in generate("--json", *args).splitlines()]


def on_a_terminal(*args: str, **options: Any) -> str:
    result = CliRunner().invoke(app, list(args), env=TERMINAL, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_is_plain_where_nobody_looks(model: MockModel) -> None:
    assert generate("--prompt", "One") == "One word. Two é!\n"
    assert generate("--prompt", "One", "--no-echo") == " word. Two é!\n"
    assert generate("--prompt", "stop", "--stop", "STOP") == "stop a \n"
    assert generate("--prompt", "One", "--max-new", 5) == "One word\n"


def test_what_the_model_is_asked(model: MockModel) -> None:
    """Also in the official spelling of the options."""
    options = "--model-path m.pt --config-path tests/test_cli.py --max-tokens 3 --prompt One"
    hnet("generate", *options.split(), "--dtype", "bfloat16", "--device", "cpu", "--plan", "masked")
    assert model.asked == ("m.pt", Path("tests/test_cli.py"), "bfloat16", "cpu")
    assert model.allocated == [(1, 1 + 3 + 3)]
    assert {plan for _, _, plan in model.steps} == {"masked"}
    generate("--prompt", "One", "--no-bos")
    assert model.prefills[-1][0].tolist() == [list(b"One")]
    assert model.state_dtype is None
    generate("--prompt", "One", "--state-dtype", "float16")
    assert model.state_dtype == torch.float16


def test_several_prompts_are_one_batch(model: MockModel) -> None:
    assert generate("--prompt", "One", "--prompt", "né") == "One word. Two é!\nné oui\n"
    assert len(model.prefills) == 1


def test_json_says_everything(model: MockModel) -> None:
    one, stop = generate_json("--prompt", "One", "--prompt", "stop", "--stop", "STOP", "--seed", 3)
    assert one["prompt"] == base64.b64decode(one["prompt_base64"]).decode() == "One"
    assert one["text"] == base64.b64decode(one["base64"]).decode() == " word. Two é!"
    assert one["finish_reason"] == "eos"
    assert one["prompt_chunk_starts"] == [[], []]  # BOS opened the first
    assert one["chunk_starts"] == [[0, 6, 10], [6]]
    assert len(one["logprobs"]) == len(TEXTS["One"])
    assert all(-1e-6 < logprob <= 0 for logprob in one["logprobs"])
    assert one["bytes_per_second"] == len(TEXTS["One"]) / one["seconds"]
    assert (one["seed"], stop["seed"]) == (3, 4)
    assert (stop["text"], stop["finish_reason"]) == (" a ", "stop")
    assert len(stop["logprobs"]) == 3
    assert stop["chunk_starts"] == [[0, 2], []]
    (short,) = generate_json("--prompt", "One", "--max-new", 6, "--no-bos")
    assert (short["finish_reason"], short["prompt_chunk_starts"]) == ("length", [[0], [0]])
    # The last byte is judged too.
    (last,) = generate_json("--prompt", "One", "--max-new", 7)
    assert last["chunk_starts"] == [[0, 6], [6]]


def test_a_seed_that_was_chosen_gives_the_text_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("h_net_dynamic_chunking.cli.generate")
    mock = MockModel(lambda read: torch.zeros(256))
    monkeypatch.setattr(module, "load_model", lambda *asked: mock)
    args = ("--max-new", 20, "--no-eos")
    first, second = (generate_json("--prompt", "a", *args)[0] for _ in range(2))
    assert first["base64"] != second["base64"]
    (again,) = generate_json("--prompt", "a", *args, "--seed", first["seed"])
    assert again["base64"] == first["base64"]
    # Also from line to line.
    command = ["generate", "--model", "any", "--interactive", "--json", *map(str, args)]
    lines = CliRunner().invoke(app, command, input="a\na\n").stdout.splitlines()
    one, other = (json.loads(line)["base64"] for line in lines)
    assert one != other


def test_prompts_that_are_not_utf8(model: MockModel, tmp_path: Path) -> None:
    """Read byte for byte; shown as U+FFFD, exact in JSON."""
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"\xff")
    assert generate("--file", prompt) == "\ufffd\ufffd\n"
    (row,) = generate_json("--file", prompt)
    assert base64.b64decode(row["prompt_base64"]) == b"\xff"
    assert base64.b64decode(row["base64"]) == b"\xe6\xbc"


def test_chunks_are_coloured_on_a_terminal(model: MockModel) -> None:
    args = ("generate", "--model", "any", "--prompt", "One")
    out = on_a_terminal(*args)
    assert ESCAPES.sub("", out) == "One word. Two é!\n"
    runs = re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)\x1b\[0m", out)
    assert "".join(text for _, text in runs) == "One word. Two é!"
    looks = [look.removeprefix("1;") for look, _ in runs]
    assert [look.startswith("1;") for look, _ in runs][:2] == [True, False]
    # One word. | Two | é!, of which the first two are two chunks of stage 0 and one of stage 1.
    by_text = {}
    for look, (_, text) in zip(looks, runs, strict=True):
        by_text.setdefault(look, []).append(text)
    assert ["".join(texts) for texts in by_text.values()] == ["One", " word.", " Two", " é!"]
    assert "\x1b" not in on_a_terminal(*args, "--no-color")
    plain = CliRunner().invoke(app, list(args), env=TERMINAL | {"NO_COLOR": "1"})
    assert plain.stdout == "One word. Two é!\n"


def test_control_codes_do_not_reach_a_terminal(model: MockModel) -> None:
    for color in ([], ["--no-color"]):
        out = on_a_terminal("generate", "--model", "any", "--prompt", "esc", *color)
        assert ESCAPES.sub("", out) == "esc␛[2J\n"
    assert generate("--prompt", "esc") == "esc\x1b[2J\n"


def test_interactive_continues_each_line(model: MockModel) -> None:
    args = ["generate", "--model", "any", "--interactive"]
    result = CliRunner().invoke(app, args, input="One\nné\n".encode())
    assert (result.exit_code, result.stdout) == (0, " word. Two é!\n oui\n")
    result = CliRunner().invoke(app, [*args, "--no-bos", "--json"], input="\nné".encode())
    assert json.loads(result.stdout)["text"] == " oui"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_there_is(model: MockModel, as_json: bool) -> None:
    """In the middle of a character, and with the start of a stop string held back."""
    follow = model.next_logits

    def next_logits(read: list[int]) -> torch.Tensor:
        if bytes(read).endswith(b"Two \xc3"):
            raise KeyboardInterrupt
        return follow(read)

    model.next_logits = next_logits
    args = ["generate", "--model", "any", "--prompt", "One", "--stop", "o \u00e9?"]
    result = CliRunner().invoke(app, [*args, *["--json"] * as_json])
    assert result.exit_code == 130
    assert result.stderr == ""
    if as_json:
        row = json.loads(result.stdout)
        assert (row["text"], row["finish_reason"]) == (" word. Two ", "interrupted")
    else:
        assert result.stdout == "One word. Two \n"


def test_ctrl_c_before_the_first_byte(model: MockModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MockModel, "forward", interrupted)
    result = CliRunner().invoke(app, ["generate", "--model", "any", "--prompt", "One"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "\n", "")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "give one of --prompt, --file and --interactive"),
        (["--prompt", "a", "--file", "tests/test_cli.py"], "give one of"),
        (["--prompt", "a", "--interactive"], "--interactive excludes"),
        (["--prompt", "", "--no-bos"], "prompts: row 0 is empty"),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "temperature must be a finite number of at least 0, got -1.0",
        ),
        (["--prompt", "a", "--stop", ""], "stop must have no empty string"),
        (["--prompt", "a", "--seed", "-1"], "seed must be an int in [0, 2^63), got -1"),
    ],
)
def test_bad_options_are_a_sentence(model: MockModel, args: list[str], sentence: str) -> None:
    assert sentence in complaint("generate", "--model", "any", *args)


def test_bad_models_are_a_sentence(tmp_path: Path) -> None:
    for command, text in (("generate", "--prompt"), ("chunks", "--text")):
        line = complaint(command, "--model", tmp_path / "absent", text, "a")
        assert "is no preset" in line
    assert "give either" in complaint("chunks", "--model", "hnet_1stage_S")
    assert "no bytes" in complaint("chunks", "--model", "hnet_1stage_S", "--text", "")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_speculation_writes_the_greedy_text(directory: Path) -> None:
    args = ("generate", "--model", directory, "--prompt", "héllo", "--max-new", 30)
    greedy = (*args, "--temperature", 0, "--no-eos")
    (plain,) = map(json.loads, hnet(*greedy, "--json").splitlines())
    (ahead,) = map(json.loads, hnet(*greedy, "--json", "--speculate", 3).splitlines())
    for name in ahead.keys() & plain.keys() - {"seed", "seconds", "bytes_per_second"}:
        assert ahead[name] == plain[name]
    assert ahead["speculation"]["written"] == 30
    assert hnet(*greedy, "--speculate", 3) == hnet(*greedy)
    command = ["generate", "--model", str(directory), "--interactive", "--max-new=9"]
    lines = CliRunner().invoke(app, [*command, "--speculate=1", "--json"], input="a\nb")
    assert [json.loads(line)["prompt"] for line in lines.stdout.splitlines()] == ["a", "b"]
    assert "one prompt, got 2" in complaint(*args, "--prompt", "b", "--speculate", 3)
    assert "excludes --plan" in complaint(*args, "--plan", "masked", "--speculate", 3)
    complaint_of_states = complaint(*args, "--state-dtype", "float16", "--speculate", 3)
    assert "excludes --state-dtype" in complaint_of_states
    assert "must be 1" in complaint(*args, "--repetition-penalty", 2, "--speculate", 3)
    assert "draft must be an int of at least 1" in complaint(*args, "--speculate", 0)


@pytest.mark.parametrize("bos", [True, False])
def test_chunks_against_a_forward_by_hand(directory: Path, bos: bool) -> None:
    text = "How is naïve 漢字 cut?"
    content = text.encode()
    with torch.no_grad():
        out = HNetLM.from_pretrained(directory)(torch.tensor([[BOS] * bos + list(content)]))
    args = ("chunks", "--model", directory, "--text", text, *["--no-bos"] * (not bos))
    got = json.loads(hnet(*args, "--json"))
    assert (got["text"], base64.b64decode(got["base64"])) == (text, content)
    depths = [0] * len(content)
    for stage, record in enumerate(out.stages):
        lens = record.intermediates.absolute_chunk_lens[0]
        starts = (lens.cumsum(0) - lens - int(bos)).tolist()
        starts = [place for place in starts if place >= 0]
        found = got["stages"][stage]
        assert found["chunk_starts"] == starts
        assert found["bytes_per_chunk"] == len(content) / len({0, *starts})
        ran = [i for i, p in enumerate(found["probs"]) if p is not None]
        assert len(ran) == record.probs.shape[1] - bos
        assert [found["probs"][i] for i in ran] == record.probs[0, bos:].tolist()
        for place in starts:
            depths[place] += 1
    shown = hnet(*args)
    assert shown.splitlines()[0] == bracketed(content, depths, CONFIG.stages)
    assert "stage 1  " in shown

    table = [line.split() for line in hnet(*args, "--table").splitlines()]
    rows = [row for row in table if row and row[0].isdigit()]
    assert len(rows) == len(content)
    assert rows[1][:2] == ["1", "'o'"]
    assert [" ".join(row).count("*") for row in rows] == depths
    colored = on_a_terminal(*map(str, args))
    assert ESCAPES.sub("", colored).splitlines()[0] == text
    assert on_a_terminal(*map(str, args), "--brackets").splitlines() == shown.splitlines()


def test_a_reader_that_went_away_ends_quietly(directory: Path) -> None:
    command = [
        sys.executable,
        "-c",
        MAIN,
        "chunks",
        "--model",
        str(directory),
        "--text",
        "some text",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def test_generation_in_a_process_of_its_own() -> None:
    program = (
        "import importlib; from tests.generation.mock_model import scripted\n"
        "module = importlib.import_module('h_net_dynamic_chunking.cli.generate')\n"
        "module.load_model = lambda *asked: scripted(One=' wörd'.encode())\n" + MAIN
    )
    result = process(program, "generate", "--model", "any", "--prompt", "One")
    assert (result.returncode, result.stdout, result.stderr) == (0, "One wörd\n", "")
