"""`hnet chunks`: how a model cuts a text."""

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from h_net_dynamic_chunking.byte_chunks import byte_chunks
from h_net_dynamic_chunking.cli.models import load_model
from h_net_dynamic_chunking.cli.options import (
    AsJson,
    BosOption,
    DeviceOption,
    ModelConfigOption,
    ModelOption,
    NoColorOption,
    StoredFloatTypeOption,
    one_sentence_errors,
)
from h_net_dynamic_chunking.cli.screen import ChunkWriter, Screen
from h_net_dynamic_chunking.decoding import BOS, BYTE_VALUES, evaluating
from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.visualize import bracketed


@one_sentence_errors()
def chunks_command(
    model: ModelOption,
    config: ModelConfigOption = None,
    text: Annotated[str | None, typer.Option(help="text to cut")] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="file to cut, byte for byte"),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="a line a byte, with p")] = False,
    brackets: Annotated[bool, typer.Option("--brackets", help="[chunks] in place of colours")] = (
        False
    ),
    bos: BosOption = True,
    dtype: StoredFloatTypeOption = None,
    device: DeviceOption = "auto",
    no_color: NoColorOption = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model cuts a text.

    Colours on a terminal: the hue changes with each chunk of the innermost stage, the shade with
    each chunk of stage 0. [Brackets] elsewhere, those of stage 0 inmost. Then the figures of each
    stage. p is the probability with which a byte opens a chunk; inner stages look only at bytes
    that open one further out.
    """
    cut = Cut.of(load_model(model, config, dtype, device), content_of(text, file), bos)
    if as_json:
        typer.echo(json.dumps(cut.as_json()))
        return
    screen = Screen(no_color)
    if table:
        screen.console.print(cut.table())
    elif screen.colored and not brackets:
        writer = ChunkWriter(screen, len(cut.probs))
        writer.feed(cut.content, cut.depths)
        writer.flush()
        screen.plain("\n")
    else:
        screen.plain(bracketed(cut.content, cut.depths, len(cut.probs)), end="\n")
    for stage in range(len(cut.probs)):
        chunks = cut.chunks(stage)
        screen.plain(
            f"stage {stage}  {chunks} chunks, {cut.bytes_per_chunk(stage):.2f} bytes each\n"
        )


def content_of(text: str | None, file: Path | None) -> bytes:
    """The bytes of --text or of --file, exactly."""
    if (text is None) == (file is None):
        raise ValueError("give either --text or --file")
    if text is not None:
        return text.encode("utf-8", errors="surrogateescape")
    assert file is not None
    return file.read_bytes()


@dataclass(frozen=True)
class Cut:
    """A text and where its chunks open."""

    content: bytes
    depths: list[int]
    """At how many stages each byte opens a chunk."""
    probs: list[list[float]]
    """Boundary probabilities of each stage, NaN where it did not run."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: HNetLM, content: bytes, bos: bool) -> "Cut":
        if not content:
            raise ValueError("the text has no bytes, so there is nothing to cut")
        if model.config.vocab_size != BYTE_VALUES:
            raise ValueError(
                f"--model must have a vocabulary of {BYTE_VALUES} bytes, "
                f"got {model.config.vocab_size}"
            )
        read = bytes([BOS] * bos) + content
        ids = torch.tensor([list(read)], device=model.embeddings.weight.device)
        with evaluating(model.modules()):
            out = model(ids)
        lens = torch.tensor([len(read)], device=ids.device)
        depths, probs = byte_chunks(out.stages, lens, len(read))
        return cls(content, depths[0, bos:].tolist(), probs[:, 0, bos:].tolist())

    def starts(self, stage: int) -> list[int]:
        """The bytes that open a chunk. The first may not: its chunk can begin with BOS."""
        return [place for place, depth in enumerate(self.depths) if depth > stage]

    def chunks(self, stage: int) -> int:
        return len({0, *self.starts(stage)})

    def bytes_per_chunk(self, stage: int) -> float:
        return len(self.content) / self.chunks(stage)

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.content.decode(errors="replace"),
            "base64": base64.b64encode(self.content).decode(),
            "stages": [
                {
                    "chunk_starts": self.starts(stage),
                    "bytes_per_chunk": self.bytes_per_chunk(stage),
                    "probs": [None if math.isnan(p) else p for p in probs],
                }
                for stage, probs in enumerate(self.probs)
            ],
        }

    def table(self) -> Table:
        """A line a byte: its place, its value, and p at each stage, * where a chunk opens."""
        table = Table("place", "byte", box=SIMPLE)
        for stage in range(len(self.probs)):
            table.add_column(f"p, stage {stage}", justify="right")
        for place, (value, depth) in enumerate(zip(self.content, self.depths, strict=True)):
            cells = [
                "" if math.isnan(probs[place]) else f"{probs[place]:.4f}{' *'[depth > stage]}"
                for stage, probs in enumerate(self.probs)
            ]
            table.add_row(str(place), repr(bytes([value]))[1:], *cells)
        return table
