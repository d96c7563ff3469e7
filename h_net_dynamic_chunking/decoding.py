"""The loop of a generation: prefill, then choose a byte and let the model read it, again and again.

What a step reads and writes stays on the device, in tensors that are changed in place and keep
their shape, so that choosing and reading can be captured as one CUDA graph. The host looks at the
bytes once a step, or every few steps on an accelerator, to see whether a row is left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.byte_chunks import byte_chunks
from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.lm_inference import check_plan
from h_net_dynamic_chunking.ops.backend import uses_triton
from h_net_dynamic_chunking.sampling import Sampling, draw, uniforms
from h_net_dynamic_chunking.step_graphs import can_record
from h_net_dynamic_chunking.stopping import NOTHING_YET, StopStrings, ends_with_any

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


class SteppingModel(Protocol):
    """What is needed of `HNetLM`."""

    config: HNetConfig

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Any: ...
    def __call__(self, input_ids: Tensor, *, lens: Tensor, inference_params: Any) -> Any: ...
    def step(self, input_ids: Tensor, cache: Any, *, active: Tensor, plan: str) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Block(NamedTuple):
    """What came since the last block, on the host."""

    contents: list[bytes]
    """The new bytes of each row."""
    logprobs: Tensor | None
    """float32 (batch, steps): of the bytes, under the model; where there is none, anything."""
    depths: Tensor | None
    """uint8 (batch, steps): at how many stages each byte opens a chunk."""
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
        plan: of `model.step`, which must also take a batch in which no row is active.
        keep_logprobs: whether blocks have log-probabilities.
        keep_depths: whether blocks have depths. Then the model reads the last bytes too.
        each_step: look at the bytes after each step, wherever the model is.

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
    ) -> None:
        if not hasattr(model, "config") or not hasattr(model, "allocate_inference_cache"):
            raise ValueError(f"model must be an HNetLM, got {type(model).__name__}")
        check_generation(model.config, prompts, max_new_bytes, bos, plan)
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
        self._steps_a_look = 1 if each_step or device.type == "cpu" else STEPS_A_LOOK

        self._parameters = sampling.parameters(batch, device)
        self._uniforms = uniforms(seeds, max_new_bytes).to(device)
        self._patterns = stops.patterns(device)

        # The state of the rows.
        vocab = model.config.vocab_size
        self._step = torch.full((1,), -1, device=device)
        self._logits = torch.zeros(batch, vocab, device=device)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._active = torch.ones(batch, dtype=torch.bool, device=device)
        self._reads = self._active.clone()
        self._recent = torch.full((batch, stops.longest), NOTHING_YET, device=device)
        self._seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)

        # What it left behind, a column a step.
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
            read_and_choose = self._recorded() or self._read_and_choose
            looked = 0
            self._choose()
            for step in range(1, self._max_new_bytes + 1):
                if self._keep_depths:
                    self._read()
                last = step == self._max_new_bytes
                if last or step - looked == self._steps_a_look:
                    block = self._look(looked, step)
                    looked = step
                    yield block
                    if not any(block.active):
                        return
                if self._keep_depths:
                    self._choose()
                else:
                    read_and_choose()

    def _recorded(self) -> Callable[[], None] | None:
        """`_read_and_choose` as CUDA graphs, where the model can record its step."""
        record = getattr(self._model, "record_step", None)
        worth_it = self._max_new_bytes >= STEPS_WORTH_RECORDING and not self._keep_depths
        if record is None or not can_record(self._ids) or self._plan == "compact" or not worth_it:
            return None

        def choose(logits: Tensor) -> None:
            self._logits.copy_(logits)
            self._choose()

        # What is chosen is what the next step reads.
        graphs = record(self._cache, self._ids.squeeze(1), self._reads, after=choose)
        replay: Callable[[], None] = graphs.replay
        return replay

    def _read_and_choose(self) -> None:
        self._read()
        self._choose()

    @torch.no_grad()
    def _prefill(self) -> None:
        device = self._logits.device
        rows = [torch.tensor([*self._bos, *prompt]) for prompt in self._prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lens = torch.tensor([len(row) for row in rows], device=device)
        batch, length = ids.shape
        self._cache = self._model.allocate_inference_cache(batch, length + self._max_new_bytes)
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
    def _choose(self) -> None:
        """The next byte of each row, and whether the row goes on. The host reads nothing."""
        self._step += 1
        if self._parameters.filters_nothing and uses_triton(self._logits):
            self._draw_by_kernel()
        else:
            self._draw()
        if self._parameters.repetition_penalty is not None:
            self._seen.scatter_(1, self._ids, True)
        if self._recent.shape[1]:
            writes = self._active.clone()
            self._recent.copy_(torch.cat([self._recent[:, 1:], self._ids], dim=1))
            self._active &= ~ends_with_any(self._recent, self._patterns)
            self._reads.copy_(writes if self._keep_depths else self._active)

    def _draw(self) -> None:
        """Fill `_ids`, the columns of this step, and `_active` and `_reads` where rows end."""
        uniform = self._uniforms.index_select(1, self._step)
        ids, logprobs = draw(self._logits, uniform, self._parameters, self._seen)
        broken = logprobs.isnan()
        ends = broken | (ids == EOS) if self._eos else broken
        writes = self._active & ~ends
        values = ids.where(writes, NO_BYTE).where(~(self._active & broken), NO_DISTRIBUTION)
        self._values.index_copy_(1, self._step, values.to(torch.int16).unsqueeze(1))
        self._logprobs.index_copy_(1, self._step, logprobs.unsqueeze(1))
        self._ids.copy_(ids.unsqueeze(1))
        self._active.copy_(writes)
        self._reads.copy_(writes)

    def _draw_by_kernel(self) -> None:
        """`_draw` in one launch in place of tens."""
        from h_net_dynamic_chunking.ops._triton.choose_step import choose_step

        choose_step(
            self._logits,
            self._uniforms,
            self._parameters.temperature,
            self._step,
            self._active,
            self._reads,
            self._ids,
            self._values,
            self._logprobs,
            eos=EOS if self._eos else None,
            no_byte=NO_BYTE,
            no_distribution=NO_DISTRIBUTION,
        )

    @torch.no_grad()
    def _read(self) -> None:
        """Let the model read the new bytes of the rows that go on."""
        out = self._model.step(self._ids, self._cache, active=self._reads, plan=self._plan)
        self._logits.copy_(out.logits[:, -1])
        if self._keep_depths:
            depths = torch.zeros_like(self._ids, dtype=torch.uint8)
            for stage in out.stages:
                depths += stage.boundary_mask.unsqueeze(1)
            self._depths.index_copy_(1, self._step, depths)

    def _look(self, start: int, end: int) -> Block:
        """Columns `start` to `end` of the record."""
        # In one tensor, because each transfer waits for the device.
        columns = [self._values[:, start:end], self._active.to(torch.int16).unsqueeze(1)]
        record = torch.cat(columns, dim=1).tolist()
        return Block(
            [_written(row[:-1], start, i) for i, row in enumerate(record)],
            self._logprobs[:, start:end].cpu() if self._keep_logprobs else None,
            self._depths[:, start:end].cpu() if self._keep_depths else None,
            [bool(row[-1]) and end < self._max_new_bytes for row in record],
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
    check_plan(plan)
    empty = [str(row) for row, prompt in enumerate(prompts) if not prompt]
    if empty and not bos:
        raise ValueError(
            f"prompts: row {', '.join(empty)} is empty, so there is nothing to start from; give "
            "it a byte, or let BOS be added"
        )
