"""`hnet compare`: how far two models are apart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from h_net_dynamic_chunking.cli.models import load_model
from h_net_dynamic_chunking.cli.options import (
    MODEL_HELP,
    AsJson,
    ClampOption,
    ConfigOption,
    DeviceOption,
    FloatTypeOption,
    one_sentence_errors,
)
from h_net_dynamic_chunking.comparison import Comparison, Summary, compare
from h_net_dynamic_chunking.config import PRESETS

PROMPT = "A chunk ends where the next byte is hard to guess, often with a word. A chunk "


@one_sentence_errors()
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help=MODEL_HELP)],
    config_a: ConfigOption = None,
    config_b: ConfigOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="text to start from (None = a sentence)")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file to start from, whole")
    ] = None,
    new_bytes: Annotated[int, typer.Option(min=1, help="length of the continuation, bytes")] = 16,
    dtype_a: FloatTypeOption = "float32",
    dtype_b: FloatTypeOption = "bfloat16",
    device_a: DeviceOption = "cpu",
    device_b: DeviceOption = "cpu",
    clamp_a: ClampOption = None,
    clamp_b: ClampOption = None,
    seed: Annotated[int, typer.Option(help="seed of a preset's weights")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two models, or one with itself in another dtype, on another device or clamped.

    Prefill compares the logits at all bytes of the prompt. Decode compares them along a greedy
    continuation, in which both models read the bytes that A chose.
    """
    text = read_prompt(prompt, file)
    model_a = load_model(a, config_a, dtype_a, device_a, seed, clamp_a)
    model_b = load_model(b, config_b, dtype_b, device_b, seed, clamp_b)
    comparison = compare(model_a, model_b, text, new_bytes)
    continuation = comparison.continuation.decode(errors="replace")
    if as_json:
        typer.echo(json.dumps(asdict(comparison) | {"continuation": continuation}))
        return
    for name, source, model, dtype, device in (
        ("A", a, model_a, dtype_a, device_a),
        ("B", b, model_b, dtype_b, device_b),
    ):
        origin = f"random weights of seed {seed}" if source in PRESETS else "its own weights"
        clamp = model.config.smoothing_clamp
        clamped = f", clamp {clamp:g}" if clamp else ""
        typer.echo(f"{name}  {source}, {origin}, {dtype} on {device}{clamped}")
    console = Console()
    console.print(logits_table(comparison))
    console.print(differences_table(comparison))
    # As a literal, because the bytes may be control codes of the terminal.
    typer.echo(f"continuation of A: {continuation!r}")


def read_prompt(text: str | None, file: Path | None) -> bytes:
    """The bytes of --prompt or of --file, exactly; a sentence if there is neither."""
    if text is not None and file is not None:
        raise ValueError("--prompt and --file exclude each other: give one")
    if file is not None:
        return file.read_bytes()
    return (PROMPT if text is None else text).encode("utf-8", errors="surrogateescape")


def logits_table(comparison: Comparison) -> Table:
    table = Table("logits", "shape", "dtype", box=SIMPLE)
    for heading in ("min", "max", "mean", "std"):
        table.add_column(heading, justify="right")

    def add_row(name: str, summary: Summary) -> None:
        numbers = (summary.min, summary.max, summary.mean, summary.std)
        shape = " x ".join(map(str, summary.shape))
        table.add_row(name, shape, summary.dtype, *(f"{number:.3f}" for number in numbers))

    for phase, difference in (("prefill", comparison.prefill), ("decode", comparison.decode)):
        add_row(f"{phase} A", difference.a)
        add_row(f"{phase} B", difference.b)
    return table


def differences_table(comparison: Comparison) -> Table:
    table = Table("A - B", box=SIMPLE)
    phases = (comparison.prefill, comparison.decode)
    for heading in ("prefill", "decode"):
        table.add_column(heading, justify="right")
    table.add_row("max |difference|", *(f"{phase.max_abs:.3g}" for phase in phases))
    table.add_row("RMS difference", *(f"{phase.rms:.3g}" for phase in phases))
    by_stage = zip(*(phase.same_boundaries for phase in phases), strict=True)
    for stage, shares in enumerate(by_stage):
        table.add_row(f"same boundaries, stage {stage}", *(f"{share:.1%}" for share in shares))
    table.add_row("same greedy bytes", *(f"{phase.same_greedy_bytes:.1%}" for phase in phases))
    return table
