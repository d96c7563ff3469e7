"""The masked step of an HNetLM as CUDA graphs; see `recording`.

A step has static shapes, so that it is recorded once and replayed for each byte. For many rows it
is one graph. For few rows it is cut where a stage is entered and left: after the way in, the host
reads whether any row opened a chunk, and leaves out all that is inside where none did.

    enter 0 | enter 1 | ... | main network | ... | leave 1 | leave 0 and head
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import Positions, Rows
from h_net_dynamic_chunking.h_net_inference import Decision, Entered, stages_of
from h_net_dynamic_chunking.recording import Recording

# Up to so many rows it happens often enough that none of them opens a chunk.
_ROWS_THAT_REST = 8


class StepGraphs:
    """The recorded step of one model on one cache.

    Args:
        embed: ids (batch,) -> (batch, dim).
        backbone: an HNet, or a stack without stages.
        head: (batch, dim) -> logits (batch, vocab).
        cache: of the backbone; its tensors are changed in place by every replay.
        ids: int64 (batch,): where every replay finds the bytes that it reads.
        active: bool (batch,): where it finds the rows that do.
        given: whether boundaries come from outside, for each stage.
        positions: of the rows, where there is no stage that counts them.
        after: recorded behind the head, with the logits: what chooses the next ids, say. It changes
            tensors in place, and may write to `ids` and `active`.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        backbone: Any,
        head: Callable[[Tensor], Tensor],
        cache: Any,
        ids: Tensor,
        active: Tensor,
        given: Sequence[bool],
        positions: Positions | None = None,
        after: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._embed, self._backbone, self._head, self._cache = embed, backbone, head, cache
        self._stages = stages_of(backbone, cache)
        self.ids, self.active = ids, active
        self.given = [torch.zeros_like(self.active) if is_given else None for is_given in given]
        self.given += [None] * (len(self._stages) - len(self.given))
        self._rests = len(ids) <= _ROWS_THAT_REST and bool(self._stages)
        self._fired = torch.zeros(max(len(self._stages), 1), dtype=torch.bool, pin_memory=True)
        self._fired_on_host = self._fired.numpy()  # the same memory, faster to read
        self._after = after
        self._counted = positions
        self._all_active = False
        self._entered: list[Entered] = []
        self._z: Tensor | None = None
        self.logits: Tensor | None = None
        # A circle would keep graphs and caches until Python looks for circles.
        segments = WeakMethod(self._segments)

        def pieces() -> list[Callable[[], None]]:
            alive = segments()
            assert alive is not None
            return alive()

        self._recording = Recording(pieces, [cache, positions], [active])

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What each router decided in the last step: overwritten by the next."""
        return tuple(Decision(entered.probs, entered.opens) for entered in self._entered)

    def load(
        self, ids: Tensor, active: Tensor | None, boundary_masks: Sequence[Tensor | None]
    ) -> None:
        """Put in what the next replay reads: all of shape (batch,)."""
        self.ids.copy_(ids)
        if active is not None:
            self.active.copy_(active)
            self._all_active = False
        elif not self._all_active:
            self.active.fill_(True)
            self._all_active = True
        for static, mask in zip(self.given, boundary_masks, strict=False):
            if static is not None and mask is not None:
                static.copy_(mask)

    def replay(self) -> None:
        """Read `ids` in the rows that are `active`; `logits` and `decisions` are new then."""
        with torch.cuda.device(self.ids.device):
            self._replay_step()

    def _replay_step(self) -> None:
        self._recording.make_room()
        if self._rests:
            self._replay_stage(0)
        else:
            self._recording.replay(0)

    def _replay_stage(self, stage: int) -> None:
        """Segments: enter 0 .. enter S-1, the main network, leave S-1 .. leave 0."""
        depth = len(self._stages)
        if stage == depth:
            self._recording.replay(depth)
            return
        self._recording.replay(stage)
        torch.cuda.current_stream().synchronize()  # the host read of a step that may rest
        if self._fired_on_host[stage]:
            self._replay_stage(stage + 1)
        elif stage + 1 < depth:
            self._forget(stage + 1)
        self._recording.replay(2 * depth - stage)

    def _forget(self, stage: int) -> None:
        """No row came so far in: nothing was decided there."""
        for entered in self._entered[stage:]:
            entered.probs.zero_()
            entered.opens.zero_()

    def _segments(self) -> list[Callable[[], None]]:
        """What to record, in order."""
        depth = len(self._stages)
        self._entered = []
        ways_in = [lambda s=s: self._enter(s) for s in range(depth)]
        ways_out = [lambda s=s: self._leave(s) for s in reversed(range(depth))]
        steps = [*ways_in, self._run_main_network, *ways_out]
        if self._rests:
            return steps

        def all_at_once() -> None:
            for step in steps:
                step()

        return [all_at_once]

    def _enter(self, stage: int) -> None:
        network, cache = self._stages[stage]
        if stage == 0:
            x, rows = self._embed(self.ids), Rows(active=self.active, checked=True)
        else:
            outer = self._entered[stage - 1]
            x = self._stages[stage - 1][0].chunks(outer)
            rows = Rows(active=outer.opens, checked=True)
        self._entered.append(network.enter(x, cache, rows, self.given[stage]))
        if self._rests:
            self._fired[stage : stage + 1].copy_(
                self._entered[stage].opens.any()[None], non_blocking=True
            )

    def _run_main_network(self) -> None:
        if not self._stages:
            rows = Rows(active=self.active, checked=True)
            self._finish(self._backbone.step(self._embed(self.ids), self._cache, rows))
            if self._counted is not None:
                self._counted.advance(1, 1, rows)
            return
        network, cache = self._stages[-1]
        entered = self._entered[-1]
        rows = Rows(active=entered.opens, checked=True)
        chunks = network.chunks(entered)
        self._z, _ = network._step_network(chunks, cache.network, rows, True, ())

    def _leave(self, stage: int) -> None:
        network, cache = self._stages[stage]
        active = self.active if stage == 0 else self._entered[stage - 1].opens
        rows = Rows(active=active, checked=True)
        assert self._z is not None
        self._z = network.leave(self._z, self._entered[stage], cache, rows)
        if stage == 0:
            self._finish(self._z)

    def _finish(self, hidden: Tensor) -> None:
        self.logits = self._head(hidden)
        # Not when all runs once before it is recorded: it would choose.
        if self._after is not None and torch.cuda.is_current_stream_capturing():
            self._after(self.logits)
