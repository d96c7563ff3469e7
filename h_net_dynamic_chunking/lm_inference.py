"""HNetLM while decoding: logits for the next byte of every row, from a cache.

A cache holds what each stage remembers of each row. `extend` reads any number of new bytes at once,
a whole prompt or a piece of it, and `step` reads one. Rows have their own positions, rows that have
ended are left out with `active`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import step_module
from h_net_dynamic_chunking.boundary_masks import check_masks, padded_masks
from h_net_dynamic_chunking.cache import ALL_ROWS, Positions, Rows, mapped
from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.h_net_inference import Decision, HNetCache, HNetInference, spread
from h_net_dynamic_chunking.layers import Isotropic
from h_net_dynamic_chunking.layers.embedding import Embedding
from h_net_dynamic_chunking.layout import layout_of, padded_view
from h_net_dynamic_chunking.lm_output import HNetLMOutput, StageRecord
from h_net_dynamic_chunking.ops.backend import Backend, chosen_backend
from h_net_dynamic_chunking.ops.plain import is_plain, parameter_of
from h_net_dynamic_chunking.recording import Recording, can_record
from h_net_dynamic_chunking.sequence_module import unwrapped
from h_net_dynamic_chunking.step_graphs import StepGraphs
from h_net_dynamic_chunking.step_kernels import fits_step_kernels, linear_by_kernel
from h_net_dynamic_chunking.waiting import WaitingStep

Plan = Literal["auto", "compact", "masked"]


@dataclass(eq=False)
class InferenceCache:
    """What an HNetLM remembers of a batch of texts."""

    config: HNetConfig
    """Of the model that it belongs to."""
    positions: Positions
    """How many bytes each row has read: those of the outermost stage, if there is one."""
    backbone: Any
    """What the layers remember."""
    graphs: dict[tuple[Backend, tuple[bool, ...]], StepGraphs] = field(default_factory=dict)
    """On a GPU, the recorded steps: by backend, and by the stages whose boundaries are given."""
    owner: Any = None
    """The model for which the steps were recorded."""

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.positions.seen.shape[0]

    def clone(self) -> "InferenceCache":
        """A cache that remembers the same, shares no tensor with this one, and goes its own way.

        Recorded steps stay behind: they hold the addresses of this one.
        """
        backbone = mapped(self.backbone, torch.clone)
        if isinstance(backbone, HNetCache):
            return InferenceCache(self.config, backbone.positions, backbone)
        return InferenceCache(self.config, mapped(self.positions, torch.clone), backbone)


class LMInference(nn.Module):
    """The decoding of an HNetLM, which says what the parts are."""

    config: HNetConfig
    embeddings: nn.Embedding
    backbone: HNetInference | Isotropic
    lm_head: nn.Linear

    @property
    def _stack(self) -> HNetInference | Isotropic:
        """The backbone, whatever wraps it."""
        return cast("HNetInference | Isotropic", unwrapped(self.backbone))

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> InferenceCache:
        """A cache before the first byte.

        Args:
            batch_size: rows.
            max_seqlen: bytes that a row may have, prompt and continuation together.
            dtype: of the hidden states to come; that of the weights if None.
            state_dtype: what Mamba-2 layers keep their states in between calls: torch.float32,
                torch.bfloat16 or torch.float16. None is float32, or float64 in a float64 model.

        16 bits halve the memory of the states, and what a step of many rows reads and writes, at
        the cost of accuracy. A step computes in float32 as ever, but rounds what it keeps. bfloat16
        has 8 significant bits: what a byte writes to the state is lost where it is smaller than
        half a unit in the last place of what is there, and a head that decays by less than 2^-9 a
        byte does not decay at all: it remembers for ever what it should forget. Heads of a new
        model begin as slow as 2^-10. In float16, with 11 bits, that is so below 2^-12, but there
        are no numbers from 65520 on: a state that gets there is infinite, and stays so. As a call
        rounds once, however many bytes it reads, a prompt in pieces or byte by byte gives slightly
        other numbers than whole.

        Raises:
            ValueError: a size below 1, or another state_dtype.
        """
        backbone = self._stack.allocate_inference_cache(batch_size, max_seqlen, dtype, state_dtype)
        if isinstance(backbone, HNetCache):
            return InferenceCache(self.config, backbone.positions, backbone)
        seen = torch.zeros(
            batch_size, dtype=torch.int64, device=parameter_of(self.embeddings).device
        )
        return InferenceCache(self.config, Positions(seen, max_seqlen), backbone)

    @torch.no_grad()
    def extend(
        self,
        input_ids: Tensor,
        inference_params: InferenceCache,
        lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        boundary_masks: Sequence[Tensor | None] = (),
    ) -> HNetLMOutput:
        """Read the next bytes of every row: `forward` with a cache, which says more."""
        x = self.embeddings(input_ids.long())
        layout = layout_of(x, lens, cu_seqlens)
        padded = layout if layout.padded else padded_view(layout)
        masks = boundary_masks
        if not layout.padded:
            x, masks = padded.unpack(layout.pack(x)), padded_masks(masks, layout, padded)
        check_masks(masks, self.config.stages, x.shape[:2])
        if x.shape[1] == 0:
            raise ValueError("input_ids must have at least one byte in some row, got none")
        counts = None if padded.inverse is None else padded.lens
        cache, length = inference_params, x.shape[1]
        rows = self._checked(cache, len(x), length, ALL_ROWS, counts)
        stages: tuple[Decision, ...] = ()
        stack = self._stack
        if isinstance(stack, HNetInference):
            result = stack.extend_stage(x, cache.backbone, padded, rows, masks)
            hidden, stages = result.output, result.stages
        else:
            hidden = stack.extend(x, cache.backbone, counts, rows)
            cache.positions.advance(length if counts is None else counts, length)
        hidden = hidden if layout.padded else layout.unpack(padded.pack(hidden))
        return self._output(self.lm_head(hidden), stages)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        inference_params: InferenceCache,
        *,
        active: Tensor | None = None,
        plan: Plan = "auto",
        boundary_masks: Sequence[Tensor | None] = (),
    ) -> HNetLMOutput:
        """Read one byte of every row. No gradients.

        Args:
            input_ids: int (batch, 1), or (batch,).
            inference_params: a cache of `allocate_inference_cache`; changes in place.
            active: bool (batch,): rows that read their byte; the others keep their cache as it is
                and get logits of 0. None: all.
            plan: "compact" runs each stage on the rows that reach it; "masked" runs all rows and
                lets those change that reach it, with static shapes. The numbers are the same.
                "auto" takes the compact one, and on a GPU the masked one, which is recorded as CUDA
                graphs. Under autocast nothing is recorded, and "auto" is the compact one.
            boundary_masks: bool (batch,) for each stage, outermost first: whether a chunk opens, in
                place of the router's word.

        Returns:
            logits (batch, 1, vocab); in `stages`, probs and boundary_mask (batch,) of each stage.

        Raises:
            ValueError: ids, masks or a cache that do not fit; the cache is as it was then.
        """
        batch_size = inference_batch(input_ids)
        check_ids("input_ids", input_ids, self.config.vocab_size)
        check_plan(plan)
        check_active(active, batch_size)
        check_masks(boundary_masks, self.config.stages, (batch_size,), (batch_size,))
        if can_record(input_ids) and plan != "compact":
            return self._replay(input_ids.flatten(), inference_params, active, boundary_masks)
        masked = plan == "masked"
        rows = Rows(active=active)
        if active is not None and not masked:
            rows = Rows(index=active.nonzero().flatten())
        rows = self._checked(inference_params, batch_size, 1, rows, None)
        hidden, stages = self._step_rows(
            input_ids.flatten(), inference_params, rows, masked, boundary_masks
        )
        logits = self._head(hidden)
        if rows.index is not None:
            logits = logits.new_zeros(batch_size, logits.shape[1]).index_copy_(
                0, rows.index, logits
            )
            stages = tuple(spread(stage, rows.index, batch_size) for stage in stages)
        elif active is not None:
            logits = logits.where(active[:, None], 0)
        return self._output(logits[:, None], stages)

    def _replay(
        self,
        ids: Tensor,
        cache: InferenceCache,
        active: Tensor | None,
        boundary_masks: Sequence[Tensor | None],
    ) -> HNetLMOutput:
        """The masked step as CUDA graphs."""
        graphs = self.recorded_step(cache, len(ids), tuple(m is not None for m in boundary_masks))
        cache.positions.check_room(1, Rows(active=active))
        graphs.load(ids, active, boundary_masks)
        graphs.replay()
        assert graphs.logits is not None
        logits = graphs.logits.clone()
        logits = logits if active is None else logits.where(active[:, None], 0)
        stages = tuple(Decision(*(part.clone() for part in d)) for d in graphs.decisions)
        return self._output(logits[:, None], stages)

    def recorded_step(
        self, cache: InferenceCache, batch_size: int, given: tuple[bool, ...] = ()
    ) -> StepGraphs:
        """The step on this cache, recorded when it is first asked for.

        Raises:
            ValueError: a cache that is not of this model.
        """
        if not isinstance(cache, InferenceCache) or cache.batch_size != batch_size:
            self._checked(cache, batch_size, 0, ALL_ROWS, None)
        if cache.owner is not self:
            cache.graphs, cache.owner = {}, self
        key = (chosen_backend(), given)
        if key not in cache.graphs:
            ids = torch.zeros_like(cache.positions.seen)
            cache.graphs[key] = self.record_step(cache, ids, ids.bool(), given)
        return cache.graphs[key]

    @torch.no_grad()
    def record_step(
        self,
        cache: InferenceCache,
        ids: Tensor,
        active: Tensor,
        given: tuple[bool, ...] = (),
        after: Callable[[Tensor], None] | None = None,
    ) -> StepGraphs:
        """Record the step on this cache; see `StepGraphs`.

        Raises:
            ValueError: a cache that is not of this model.
        """
        self._checked(cache, len(ids), 0, ALL_ROWS, None)
        return StepGraphs(
            self._embed,
            self._stack,
            self._head,
            cache.backbone,
            ids,
            active,
            given,
            None if isinstance(cache.backbone, HNetCache) else cache.positions,
            after,
        )

    @torch.no_grad()
    def waiting_step(
        self,
        cache: InferenceCache,
        ids: Tensor,
        reads: Tensor,
        choose: Callable[[Tensor, Tensor], None],
    ) -> Callable[[int], None]:
        """A step in which rows wait; see `WaitingStep`. On a GPU it is recorded.

        Takes the depth. A model without stages has none.

        Raises:
            ValueError: a cache that is not of this model.
        """
        self._checked(cache, len(ids), 0, ALL_ROWS, None)
        step = WaitingStep(self._embed, self._stack, self._head, cache.backbone, ids, reads, choose)
        if not can_record(ids):
            return step.run

        def pieces() -> list[Callable[[], None]]:
            return [partial(step.run, depth) for depth in range(step.depth + 1)]

        return Recording(pieces, cache.backbone, step.waits).run

    def _embed(self, ids: Tensor) -> Tensor:
        """What a recorded step begins with: (rows, dim) of ids (rows,)."""
        weight = parameter_of(self.embeddings)
        plain = is_plain(self.embeddings, Embedding) and weight.is_contiguous()
        if plain and fits_step_kernels(weight, weight, ALL_ROWS):
            from h_net_dynamic_chunking.ops._triton.embed_step import embed_step

            return embed_step(weight, ids)
        x: Tensor = self.embeddings(ids)
        return x

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (rows, vocab) of hidden states (rows, dim)."""
        logits = None
        if fits_step_kernels(hidden, parameter_of(self.lm_head), ALL_ROWS):
            logits = linear_by_kernel(hidden, self.lm_head)
        return self.lm_head(hidden) if logits is None else logits

    def _step_rows(
        self,
        ids: Tensor,
        cache: InferenceCache,
        rows: Rows,
        masked: bool,
        boundary_masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, tuple[Decision, ...]]:
        """Hidden states (rows, dim) of the bytes that these rows of ids (batch,) read."""
        x = self.embeddings(rows.read(ids).long())
        stages: tuple[Decision, ...] = ()
        stack = self._stack
        if isinstance(stack, HNetInference):
            masks = [None if mask is None else rows.read(mask) for mask in boundary_masks]
            result = stack.step(x, cache.backbone, rows, masked=masked, boundary_masks=masks)
            hidden, stages = result.output, result.stages
        else:
            hidden = stack.step(x, cache.backbone, rows)
            cache.positions.advance(1, 1, rows)
        return hidden, stages

    def _checked(
        self, cache: Any, batch_size: int, new: int, rows: Rows, lens: Tensor | None
    ) -> Rows:
        """The rows, for the layers, if the cache is of this model and has room; else ValueError."""
        if not isinstance(cache, InferenceCache):
            raise ValueError(
                "inference_params must be what allocate_inference_cache returned, "
                f"got {type(cache).__name__}"
            )
        if cache.config != self.config:
            raise ValueError("inference_params must be of this model, got those of another one")
        if cache.batch_size != batch_size:
            raise ValueError(
                f"inference_params must be for the {batch_size} rows of input_ids, "
                f"got some for {cache.batch_size}"
            )
        cache.positions.check_room(new, rows, lens)
        dtype = parameter_of(self.embeddings).dtype
        step_module.check_cache("backbone", self.backbone, cache.backbone, batch_size, dtype)
        return replace(rows, checked=True)

    def _output(self, logits: Tensor, stages: tuple[Decision, ...]) -> HNetLMOutput:
        nothing = logits.new_zeros((), dtype=torch.float32)
        return HNetLMOutput(logits, None, None, nothing, tuple(map(StageRecord, stages)))


def inference_batch(input_ids: Tensor) -> int:
    """Rows of the ids of one step.

    Raises:
        ValueError: they are not (batch, 1) or (batch,).
    """
    if not isinstance(input_ids, Tensor) or not (
        input_ids.ndim == 1 or (input_ids.ndim == 2 and input_ids.shape[1] == 1)
    ):
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must have shape (batch, 1) or (batch,), got {got}")
    return input_ids.shape[0]


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless the ids are integers in 0 .. vocab_size - 1."""
    check_integers(name, ids)
    check_range(name, ids, vocab_size)


def check_integers(name: str, ids: Tensor) -> None:
    """Raise ValueError unless this is a tensor of integers."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")


def check_range(name: str, ids: Tensor, vocab_size: int, besides: int | None = None) -> None:
    """Raise ValueError unless the ids are in 0 .. vocab_size - 1, or `besides`.

    On a GPU nothing is read, because that would stop the host.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # torch does not compare unsigned integers of more than 8 bits.
    flat = (ids.values() if ids.is_nested else ids).long()
    flat = flat if besides is None else flat[flat != besides]
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocab_size:
        raise ValueError(
            f"{name} must be in 0 .. {vocab_size - 1}, got {int(flat.min())} .. {int(flat.max())}"
        )


def check_plan(plan: str) -> None:
    """Raise ValueError unless it is one of the plans."""
    if plan not in get_args(Plan):
        raise ValueError(f"plan must be one of {', '.join(get_args(Plan))}, got {plan!r}")


def check_active(active: Tensor | None, batch_size: int) -> None:
    """Raise ValueError unless `active` is bool (batch,), or None."""
    if active is None:
        return
    if not isinstance(active, Tensor):
        raise ValueError(f"active must be a tensor of bool, got {type(active).__name__}")
    if active.dtype != torch.bool or active.shape != (batch_size,):
        raise ValueError(
            f"active must be bool of shape ({batch_size},), "
            f"got {active.dtype} of shape {tuple(active.shape)}"
        )
