"""`hnet generate`: a model continues prompts."""

import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from h_net_dynamic_chunking.cli.continuation import Continuation, Settings, continue_rows
from h_net_dynamic_chunking.cli.models import load_model
from h_net_dynamic_chunking.cli.options import (
    INTERRUPTED,
    AsJson,
    BosOption,
    DeviceOption,
    ModelConfigOption,
    ModelOption,
    NoColorOption,
    StateFloatTypeOption,
    StoredFloatTypeOption,
    one_sentence_errors,
)
from h_net_dynamic_chunking.cli.screen import ChunkWriter, Screen, byte_bar
from h_net_dynamic_chunking.cli.speculate import check_speculate, write_speculated
from h_net_dynamic_chunking.generation import stop_bytes
from h_net_dynamic_chunking.lm_inference import Plan
from h_net_dynamic_chunking.sampling import Sampling, row_seeds
from h_net_dynamic_chunking.stopping import StopStrings


@one_sentence_errors()
def generate_command(
    model: ModelOption,
    config: ModelConfigOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="text to continue; several are one batch")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="file to continue, byte for byte"),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="continue each line of stdin, until it ends")
    ] = False,
    max_new: Annotated[
        int, typer.Option("--max-new", "--max-tokens", min=1, help="most bytes to add to a prompt")
    ] = 1024,
    temperature: Annotated[float, typer.Option(help="0 = the most probable byte")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="keep so many bytes")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep bytes of this share together")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="keep bytes this many times as probable as the best")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="over 1: repeats are rarer")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="prompt r draws from seed + r (None = a new one)")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="end before this text; can be given again")
    ] = None,
    bos: BosOption = True,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="end at EOS = 255")] = True,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="show the prompt too")] = True,
    plan: Annotated[Plan, typer.Option(help="how rows that open no chunk are stepped")] = "auto",
    speculate: Annotated[
        int | None, typer.Option(help="guess so many bytes ahead; no faster (None = do not)")
    ] = None,
    dtype: StoredFloatTypeOption = None,
    state_dtype: StateFloatTypeOption = None,
    device: DeviceOption = "auto",
    no_color: NoColorOption = False,
    as_json: AsJson = False,
) -> None:
    """Continue prompts, as the text comes.

    Chunks are coloured on a terminal: the hue changes with each chunk of the innermost stage, the
    shade with each chunk of stage 0; the prompt is bold. Elsewhere the text is plain. --json gives
    an object a prompt, a line each, with every byte. Ctrl-C ends the text, and what there is stays.

    --speculate writes one prompt by self-speculation: the text comes at the end and without
    colours, and --json says what was guessed and kept.
    """
    if interactive and (prompt or file is not None):
        raise ValueError("--interactive excludes --prompt and --file")
    prompts = None if interactive else prompts_of(prompt, file)
    if seed is not None:
        row_seeds(seed, 1)  # before a model is loaded in vain
    if speculate is not None:
        check_speculate(prompts, plan, state_dtype)
    settings = Settings(
        max_new,
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        StopStrings(stop_bytes(stop)),
        bos,
        eos,
        plan,
        None if state_dtype is None else getattr(torch, state_dtype),
    )
    loaded = load_model(model, config, dtype, device)
    screen = Screen(no_color)
    if speculate is not None:
        for text in lines() if prompts is None else prompts:
            if text or bos or not interactive:
                shown = echo and not interactive
                write_speculated(loaded, text, seed, speculate, settings, screen, shown, as_json)
        return
    if prompts is not None:
        if not write(loaded, prompts, seed, settings, screen, echo, as_json):
            raise typer.Exit(INTERRUPTED)
        return
    for line in lines():
        if line or bos:
            # Ctrl-C ends the text alone; the line is on the screen already.
            write(loaded, [line], seed, settings, screen, echo=False, as_json=as_json)


def write(
    model: Any,
    prompts: list[bytes],
    seed: int | None,
    settings: Settings,
    screen: Screen,
    echo: bool,
    as_json: bool,
) -> bool:
    """Continue the prompts and show what came; False after Ctrl-C.

    One prompt is shown as its text comes; several one after another at the end, and a bar before.
    """
    # Known, and part of the JSON, so that a text that was met by chance can be had again.
    seed = secrets.randbelow(2**31) if seed is None else seed
    seeds = row_seeds(seed, len(prompts))
    rows = [Continuation(*row, settings) for row in zip(prompts, seeds, strict=True)]
    stages = model.config.stages
    views = [View(screen, row, stages, echo) for row in rows]
    live = len(rows) == 1 and not as_json
    finished = True
    try:
        with byte_bar(len(rows) * settings.max_new, shown=not live) as show:
            for _ in continue_rows(model, rows, settings, each_step=live):
                if live:
                    views[0].update()
                show(sum(len(row.content) for row in rows))
    except KeyboardInterrupt:
        finished = False
        for row in rows:
            row.give_up()
    for row, view in zip(rows, views, strict=True):
        if as_json:
            typer.echo(json.dumps(row.as_json(stages)))
        else:
            view.close()
    return finished


class View:
    """A row on the screen, up to date as often as asked."""

    def __init__(self, screen: Screen, row: Continuation, stages: int, echo: bool) -> None:
        self._screen = screen
        self._row = row
        self._writer = ChunkWriter(screen, stages)
        self._echo = echo
        self._shown = 0

    def update(self) -> None:
        """Write what came since the last time, and the prompt before it if wanted."""
        row = self._row
        # Noted first, so that what Ctrl-C cuts short is not written twice.
        if self._echo and row.begun:
            self._echo = False
            self._writer.feed(row.prompt, row.prompt_depths, bold=True)
        start, self._shown = self._shown, len(row.content)
        self._writer.feed(row.content[start:], row.depths[start : self._shown])

    def close(self) -> None:
        """Write the rest, and end the line."""
        self.update()
        self._writer.flush()
        self._screen.plain("\n")


def prompts_of(prompts: list[str] | None, file: Path | None) -> list[bytes]:
    """The bytes of every --prompt or of --file, exactly."""
    if bool(prompts) == (file is not None):
        raise ValueError("give one of --prompt, --file and --interactive")
    if prompts:
        return [prompt.encode("utf-8", errors="surrogateescape") for prompt in prompts]
    assert file is not None
    return [file.read_bytes()]


def lines() -> Iterator[bytes]:
    """Each line of stdin; a terminal is asked for them."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.rstrip(b"\r\n")
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        yield line.encode("utf-8", errors="surrogateescape")
