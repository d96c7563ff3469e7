"""The loop of a generation: prefill, then choose a byte and let the model read it, again and again.

What a step reads and writes stays on the device, in tensors that are changed in place and keep
their shape, so that choosing and reading can be captured as one CUDA graph. The host looks at the
bytes once a step, or every few steps on an accelerator, to see whether a row is left. A step writes
a byte to every row that goes on, or, where rows wait for each other, to some of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.byte_chunks import byte_chunks
from h_net_dynamic_chunking.cache import check_state_dtype
from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.ops.backend import uses_triton
from h_net_dynamic_chunking.recording import can_record
from h_net_dynamic_chunking.sampling import Sampling, draw, uniforms
from h_net_dynamic_chunking.stopping import NOTHING_YET, StopStrings, ends_with_any
from h_net_dynamic_chunking.waiting import depths, usual_periods

Plan = Literal["auto", "compact", "masked", "waiting"]

BYTE_VALUES = 256
BOS = 254
EOS = 255

# Marks in the record of new bytes.
NO_BYTE = -1
NO_DISTRIBUTION = -2

# Bytes that an accelerator chooses before the host looks at them, where nobody waits for each. Rows
# that end in between rest, so that at most so many steps without a row left are run.
STEPS_A_LOOK = 16
# From so many steps on, recording one pays: it takes about as long as so many that are launched.
STEPS_WORTH_RECORDING = 32
# From so many rows on, they wait for each other on an accelerator.
ROWS_THAT_WAIT = 4


class SteppingModel(Protocol):
    """What is needed of `HNetLM`."""

    config: HNetConfig

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> Any: ...
    def __call__(self, input_ids: Tensor, *, lens: Tensor, inference_params: Any) -> Any: ...
    def step(self, input_ids: Tensor, cache: Any, *, active: Tensor, plan: str) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Block(NamedTuple):
    """What came since the last block, on the host."""

    contents: list[bytes]
    """The new bytes of each row."""
    logprobs: list[Tensor] | None
    """float32 (bytes,) of each row: of the bytes, under the model."""
    depths: list[Tensor] | None
    """uint8 (bytes,) of each row: at how many stages each byte opens a chunk."""
    active: list[bool]
    """Which rows go on."""


class Decoding:
    """Rows that a model continues.

    Args:
        model: an HNetLM, on the device where all happens.
        prompts: what each row starts from.
        max_new_bytes: most bytes to write to a row.
        sampling: how they are drawn.
        seeds: one a row.
        stops: strings that end a row.
        bos: whether the model reads BOS before the prompt.
        eos: whether EOS ends a row; without, it is a byte like any other.
        plan: of `model.step`, which must also take a batch in which no row is active; "waiting"
            lets rows that open a chunk wait for others, see `waiting`. "auto" may mean any.
        keep_logprobs: whether blocks have log-probabilities.
        keep_depths: whether blocks have depths. Then the model reads the last bytes too.
        each_step: look at the bytes after each step, wherever the model is.
        periods: where rows wait, steps of each level for one of the next, outermost first; None
            goes by the chunks of the prompts.
        state_dtype: of the states in the cache; see `HNetLM.allocate_inference_cache`.

    Raises:
        ValueError: an argument that cannot be, by name. The model has not run then.
    """

    def __init__(
        self,
        model: SteppingModel,
        prompts: Sequence[bytes],
        max_new_bytes: int,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: StopStrings,
        bos: bool = True,
        eos: bool = True,
        plan: str = "auto",
        keep_logprobs: bool = False,
        keep_depths: bool = False,
        each_step: bool = False,
        periods: Sequence[int] | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(model, "config") or not hasattr(model, "allocate_inference_cache"):
            raise ValueError(f"model must be an HNetLM, got {type(model).__name__}")
        check_generation(model.config, prompts, max_new_bytes, bos, plan)
        check_state_dtype(state_dtype)
        if plan == "waiting" and (keep_depths or not model.config.stages):
            why = "depths are kept" if keep_depths else "there is no stage"
            raise ValueError(f"plan must be another than 'waiting' where {why}")
        device = next(model.parameters()).device
        batch = len(prompts)
        self.prompt_depths: list[Tensor] = []
        """uint8 (length,) on the CPU for each prompt, if depths are kept, once the first block is
        there. BOS does not count."""
        self._model = model
        self._prompts = prompts
        self._bos = [BOS] if bos else []
        self._eos = eos
        self._plan = plan
        self._keep_logprobs = keep_logprobs
        self._keep_depths = keep_depths
        self._max_new_bytes = max_new_bytes
        self._periods = periods
        self._state_dtype = state_dtype
        self._steps_a_look = 1 if each_step or device.type == "cpu" else STEPS_A_LOOK

        self._parameters = sampling.parameters(batch, device)
        self._uniforms = uniforms(seeds, max_new_bytes).to(device)
        self._patterns = stops.patterns(device)

        # The state of the rows.
        vocab = model.config.vocab_size
        self._logits = torch.zeros(batch, vocab, device=device)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._active = torch.ones(batch, dtype=torch.bool, device=device)
        self._reads = self._active.clone()
        self._recent = torch.full((batch, stops.longest), NOTHING_YET, device=device)
        self._seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)

        # What they wrote, a column a byte, and how much of it the host has seen.
        self._written = torch.zeros(batch, dtype=torch.int64, device=device)
        self._looked = self._written.clone()
        columns = (batch, max_new_bytes)
        self._values = torch.full(columns, NO_BYTE, dtype=torch.int16, device=device)
        self._logprobs = torch.zeros(columns, device=device)
        self._depths = torch.zeros(columns, dtype=torch.uint8, device=device)

    def blocks(self) -> Iterator[Block]:
        """Write the bytes, once. The model is in eval mode until the last block, or `close()`."""
        if not self._prompts or not self._max_new_bytes:
            return
        with evaluating(self._model.modules()):
            self._prefill()
            self._choose(self._logits)
            step = self._next_step()
            steps = since_look = 0
            while True:
                steps, since_look = steps + 1, since_look + 1
                if self._keep_depths:
                    self._read()
                # No row is full before.
                if since_look == self._steps_a_look or steps == self._max_new_bytes:
                    since_look = 0
                    block = self._look()
                    yield block
                    if not any(block.active):
                        return
                step()

    def _next_step(self) -> Callable[[], None]:
        """What makes new bytes out of those that are there, which are read already with depths."""
        if self._keep_depths:
            return lambda: self._choose(self._logits)
        waits = self._plan == "waiting"
        on_a_gpu = can_record(self._ids) and self._max_new_bytes >= STEPS_WORTH_RECORDING
        if self._plan == "auto" and on_a_gpu and hasattr(self._model, "waiting_step"):
            waits = self._model.config.stages > 0 and len(self._prompts) >= ROWS_THAT_WAIT
        if waits:
            return self._waiting()
        record = getattr(self._model, "record_step", None)
        if on_a_gpu and record is not None and self._plan != "compact":
            # What is chosen is what the next step reads.
            graphs = record(self._cache, self._ids.squeeze(1), self._reads, after=self._choose)
            replay: Callable[[], None] = graphs.replay
            return replay
        return self._read_and_choose

    def _waiting(self) -> Callable[[], None]:
        model: Any = self._model
        run = model.waiting_step(self._cache, self._ids.squeeze(1), self._reads, self._choose)
        rhythm = depths(self._periods or usual_periods(self._cache.backbone))
        return lambda: run(next(rhythm))

    def _read_and_choose(self) -> None:
        self._read()
        self._choose(self._logits)

    @torch.no_grad()
    def _prefill(self) -> None:
        device = self._logits.device
        rows = [torch.tensor([*self._bos, *prompt]) for prompt in self._prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lens = torch.tensor([len(row) for row in rows], device=device)
        batch, length = ids.shape
        self._cache = self._model.allocate_inference_cache(
            batch, length + self._max_new_bytes, state_dtype=self._state_dtype
        )
        out = self._model(ids, lens=lens, inference_params=self._cache)
        self._logits.copy_(out.logits[torch.arange(batch, device=device), lens - 1])
        # A pad counts as the last byte, which was seen.
        real = torch.arange(length, device=device) < lens.unsqueeze(1)
        self._seen.scatter_(1, ids.where(real, ids.gather(1, lens.unsqueeze(1) - 1)), True)
        if self._keep_depths:
            depths = byte_chunks(out.stages, lens, length).depths.cpu()
            start = len(self._bos)
            self.prompt_depths = [
                row[start : start + len(prompt)]
                for row, prompt in zip(depths, self._prompts, strict=True)
            ]

    @torch.no_grad()
    def _choose(self, logits: Tensor, whose: Tensor | None = None) -> None:
        """The next byte of the rows `whose` logits these are, or of all, where they go on.

        And whether they do, after it. The host reads nothing.
        """
        turns = self._active if whose is None else whose
        by_kernel = self._parameters.filters_nothing and uses_triton(logits)
        if not by_kernel or self._recent.shape[1]:  # which need them when rows have ended
            turns = turns & self._active
        if by_kernel:
            self._draw_by_kernel(logits, turns)
        else:
            self._draw(logits, turns)
        if self._parameters.repetition_penalty is not None:
            self._seen.scatter_(1, self._ids, True)
        if self._recent.shape[1]:
            moved = torch.cat([self._recent[:, 1:], self._ids], dim=1)
            self._recent.copy_(moved.where(turns.unsqueeze(1), self._recent))
            self._active &= ~(turns & ends_with_any(self._recent, self._patterns))
            if not self._keep_depths:
                self._reads &= self._active

    def _draw(self, logits: Tensor, turns: Tensor) -> None:
        """The next bytes of the rows `turns`, and `_active` and `_reads` where rows end."""
        column = self._written.clamp(max=self._max_new_bytes - 1).unsqueeze(1)
        uniform = self._uniforms.gather(1, column)
        ids, logprobs = draw(logits, uniform, self._parameters, self._seen)
        broken = logprobs.isnan()
        ends = broken | (ids == EOS) if self._eos else broken
        writes = turns & ~ends
        values = ids.where(writes, NO_BYTE).where(~(turns & broken), NO_DISTRIBUTION)
        for record, new in ((self._values, values), (self._logprobs, logprobs)):
            new = new.to(record.dtype).unsqueeze(1)
            record.scatter_(1, column, new.where(turns.unsqueeze(1), record.gather(1, column)))
        self._ids.copy_(ids.where(turns, self._ids.squeeze(1)).unsqueeze(1))
        self._written += writes
        full = self._written == self._max_new_bytes
        self._active.copy_(torch.where(turns, writes & ~full, self._active))
        self._reads.copy_(writes if self._keep_depths else writes & ~full)

    def _draw_by_kernel(self, logits: Tensor, turns: Tensor) -> None:
        """`_draw` in one launch in place of tens."""
        from h_net_dynamic_chunking.ops._triton.choose_step import choose_step

        choose_step(
            logits,
            self._uniforms,
            self._parameters.temperature,
            turns,
            self._written,
            self._active,
            self._reads,
            self._ids,
            self._values,
            self._logprobs,
            eos=EOS if self._eos else None,
            reads_last=self._keep_depths,
            no_distribution=NO_DISTRIBUTION,
        )

    @torch.no_grad()
    def _read(self) -> None:
        """Let the model read the new bytes of the rows that go on."""
        out = self._model.step(self._ids, self._cache, active=self._reads, plan=self._plan)
        self._logits.copy_(out.logits[:, -1])
        if self._keep_depths:
            opened = torch.zeros_like(self._ids, dtype=torch.uint8)
            for stage in out.stages:
                opened += stage.boundary_mask.unsqueeze(1)
            column = (self._written - 1).clamp(min=0).unsqueeze(1)
            old = self._depths.gather(1, column)
            self._depths.scatter_(1, column, opened.where(self._reads.unsqueeze(1), old))

    def _look(self) -> Block:
        """What was written since the last look, at most a byte a step."""
        steps = torch.arange(self._steps_a_look, device=self._looked.device)
        columns = self._looked.unsqueeze(1) + steps
        behind = columns >= self._max_new_bytes
        columns = columns.clamp(max=self._max_new_bytes - 1)
        values = self._values.gather(1, columns).where(~behind, NO_BYTE)
        # In one tensor, because each transfer waits for the device.
        state = torch.stack((self._looked, self._active), dim=1)
        record = torch.cat((values, state), dim=1).tolist()
        contents = [_written(row[:-2], row[-2], i) for i, row in enumerate(record)]
        self._looked.copy_(self._written)

        def of_bytes(kept: bool, table: Tensor) -> list[Tensor] | None:
            if not kept:
                return None
            rows = zip(table.gather(1, columns).cpu(), contents, strict=True)
            return [row[: len(content)] for row, content in rows]

        return Block(
            contents,
            of_bytes(self._keep_logprobs, self._logprobs),
            of_bytes(self._keep_depths, self._depths),
            [bool(row[-1]) for row in record],
        )


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """All in eval mode; those that were in training mode return to it."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _written(values: list[int], start: int, row: int) -> bytes:
    """The bytes in a row of the record, up to the first mark."""
    if NO_DISTRIBUTION in values:
        raise ValueError(
            f"model: its logits are not finite after {start + values.index(NO_DISTRIBUTION)} new "
            f"bytes of prompts[{row}]"
        )
    return bytes(values[: values.index(NO_BYTE)] if NO_BYTE in values else values)


def check_generation(
    config: HNetConfig,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    bos: bool,
    plan: str = "auto",
) -> None:
    """Raise ValueError, by name, unless these arguments of a `Decoding` can be."""
    if config.vocab_size != BYTE_VALUES:
        raise ValueError(
            f"model must have a vocabulary of {BYTE_VALUES} bytes, got {config.vocab_size}"
        )
    if isinstance(max_new_bytes, bool) or not isinstance(max_new_bytes, int) or max_new_bytes < 0:
        raise ValueError(f"max_new_bytes must be an int of at least 0, got {max_new_bytes!r}")
    if plan not in get_args(Plan):
        raise ValueError(f"plan must be one of {', '.join(get_args(Plan))}, got {plan!r}")
    empty = [str(row) for row, prompt in enumerate(prompts) if not prompt]
    if empty and not bos:
        raise ValueError(
            f"prompts: row {', '.join(empty)} is empty, so there is nothing to start from; give "
            "it a byte, or let BOS be added"
        )
