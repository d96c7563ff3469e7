"""Prompts that are continued with all that the command shows: bytes, chunks, log-probabilities."""

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from h_net_dynamic_chunking.decoding import Block, Decoding, SteppingModel
from h_net_dynamic_chunking.sampling import Sampling
from h_net_dynamic_chunking.stopping import StopFilter, StopStrings


@dataclass(frozen=True)
class Settings:
    """What all rows share; see `generation.generate`."""

    max_new: int
    sampling: Sampling
    stops: StopStrings
    bos: bool
    eos: bool
    plan: str
    state_dtype: torch.dtype | None = None


class Continuation:
    """A prompt and what has been written to it."""

    def __init__(self, prompt: bytes, seed: int, settings: Settings) -> None:
        self.prompt = prompt
        self.prompt_depths: list[int] = []
        self.seed = seed
        self.begun = False
        self.going = True
        self.content = b""
        """What is there, without bytes that a stop string may begin with."""
        self.depths: list[int] = []
        """At how many stages each byte opens a chunk; also of bytes that are held back or cut."""
        self.logprobs: list[float] = []
        self.finish_reason = "interrupted"
        self.seconds = 0.0
        self._filter = StopFilter(settings.stops)
        self._max_new = settings.max_new

    def add(self, block: Block, row: int, seconds: float) -> None:
        """Add what came to this row, `seconds` after the start."""
        assert block.depths is not None
        assert block.logprobs is not None
        new = block.contents[row]
        self.depths += block.depths[row].tolist()
        self.logprobs += block.logprobs[row].tolist()
        self.going = block.active[row]
        self.content += self._filter.feed(new, ended=not self.going)
        self.seconds = seconds
        if not self.going:
            full = len(self.depths) == self._max_new
            self.finish_reason = "stop" if self._filter.stopped else "length" if full else "eos"

    def give_up(self) -> None:
        """End in the middle. What was held back counts."""
        if self.going:
            self.going = False
            self.content += self._filter.feed(b"", ended=True)

    def as_json(self, stages: int) -> dict[str, Any]:
        """Everything; places count from the start of the prompt, or of the new bytes."""
        length = len(self.content)

        def starts(depths: list[int]) -> list[list[int]]:
            return [[i for i, depth in enumerate(depths) if depth > s] for s in range(stages)]

        return {
            "prompt": self.prompt.decode(errors="replace"),
            "prompt_base64": base64.b64encode(self.prompt).decode(),
            "prompt_chunk_starts": starts(self.prompt_depths),
            "text": self.content.decode(errors="replace"),
            "base64": base64.b64encode(self.content).decode(),
            "chunk_starts": starts(self.depths[:length]),
            "logprobs": self.logprobs[:length],
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "seconds": self.seconds,
            "bytes_per_second": length / self.seconds if self.seconds else 0.0,
        }


def continue_rows(
    model: Any, rows: list[Continuation], settings: Settings, each_step: bool
) -> Iterator[None]:
    """Write to all rows, and yield whenever something came. Seconds count from here."""
    decoding = Decoding(
        cast("SteppingModel", model),
        [row.prompt for row in rows],
        settings.max_new,
        sampling=settings.sampling,
        seeds=[row.seed for row in rows],
        stops=settings.stops,
        bos=settings.bos,
        eos=settings.eos,
        plan=settings.plan,
        state_dtype=settings.state_dtype,
        keep_logprobs=True,
        keep_depths=True,
        each_step=each_step,
    )
    start = time.perf_counter()
    for block in decoding.blocks():
        for place, row in enumerate(rows):
            if not row.begun:
                row.begun = True
                row.prompt_depths = decoding.prompt_depths[place].tolist()
            if row.going:
                row.add(block, place, time.perf_counter() - start)
        yield
