"""What attention remembers: keys and values, in slots that grow or in a ring.

Row r of position t stands in slot t, or t modulo slots in a ring, which holds just the positions
that a window still reaches. Without a window the slots double as they fill, so that a stage which
sees few positions holds few slots. Every row has its own position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from h_net_dynamic_chunking.cache import ALL_ROWS, Positions, Rows
from h_net_dynamic_chunking.ops.backend import uses_triton

# A cache without a window begins with so many slots.
_FIRST_SLOTS = 256


@dataclass(eq=False)
class AttentionCache:
    """The keys and values of the positions so far."""

    keys: Tensor
    """(batch, slots, heads, head_dim), turned by their positions."""
    values: Tensor
    """(batch, slots, heads, head_dim)."""
    positions: Positions
    """How many positions each row has seen; limited unless the slots are a ring."""
    ring: bool
    """Whether new positions overwrite the oldest, which the window has left behind."""

    @classmethod
    def empty(
        cls,
        like: Tensor,
        batch_size: int,
        max_seqlen: int,
        heads: tuple[int, int],
        window_size: int,
        dtype: torch.dtype | None,
    ) -> "AttentionCache":
        """No positions yet; on the device, and of the dtype, of `like` unless `dtype` is given.

        heads: number of heads, and channels of each.
        """
        ring = window_size != -1 and window_size < max_seqlen
        slots = window_size + 1 if ring else min(max_seqlen, _FIRST_SLOTS)
        keys, values = like.new_zeros(2, batch_size, slots, *heads, dtype=dtype)  # in one launch
        return cls(
            keys=keys,
            values=values,
            positions=Positions(
                like.new_zeros(batch_size, dtype=torch.int64), None if ring else max_seqlen
            ),
            ring=ring,
        )

    @property
    def slots(self) -> int:
        """Positions that there is room for at the moment."""
        return self.keys.shape[1]

    @property
    def bytes_at_limit(self) -> int:
        """Bytes of keys and values with slots for every position; of a ring, as it is."""
        slots = self.slots if self.positions.limit is None else self.positions.limit
        return 2 * self.keys.nbytes // self.slots * slots

    @property
    def position(self) -> Tensor:
        """int64 (batch,): how many positions each row has seen."""
        return self.positions.seen

    def reserve(self, new: int) -> None:
        """Have slots for `new` more positions of each row, where the limit allows."""
        if self.positions.limit is None or self.positions.bound + new <= self.slots:
            return
        self.positions.tighten()
        needed = min(self.positions.bound + new, self.positions.limit)
        if needed > self.slots:
            slots = min(max(needed, 2 * self.slots), self.positions.limit)
            batch_size, _, *heads = self.keys.shape
            if self.positions.bound == 0:
                self.keys, self.values = self.keys.new_zeros(2, batch_size, slots, *heads)
                return
            more = self.keys.new_zeros(batch_size, slots - self.slots, *heads)
            self.keys, self.values = (
                torch.cat((old, more), dim=1) for old in (self.keys, self.values)
            )

    @property
    def _in_use(self) -> int:
        """How many slots may hold something; all of them, for a step that is being recorded."""
        if self.ring or (self.keys.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self.slots
        return min(self.positions.bound, self.slots)

    def append(
        self, key: Tensor, value: Tensor, rows: Rows = ALL_ROWS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add one position (rows, heads, head_dim) to each row.

        Returns keys and values (rows, slots in use, heads, head_dim), and bool (rows, slots in
        use): which of them each row has. A row that is not active keeps what it had.
        """
        self.reserve(1)
        position = rows.read(self.position)
        slot = position % self.slots if self.ring else position.clamp(max=self.slots - 1)
        index = rows.indices(len(key), key.device)
        for cached, new in ((self.keys, key), (self.values, value)):
            new = new.to(cached.dtype)
            if rows.active is not None:
                new = new.where(rows.active[:, None, None], cached[index, slot])
            cached[index, slot] = new
        self.positions.advance(1, 1, rows)
        # At least one, so that a row that is not active has something finite to attend to.
        seen = rows.read(self.position).clamp(min=1)[:, None]
        used = torch.arange(self._in_use, device=key.device) < seen
        return (*self._read(rows), used)

    def history(self, rows: Rows = ALL_ROWS) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values so far, and int64 (rows, slots): their positions, -1 in a free slot."""
        slot = torch.arange(self._in_use, device=self.keys.device)
        position = rows.read(self.position)[:, None]
        # The latest position before the next one that belongs in the slot.
        held = position - 1 - (position - 1 - slot) % self.slots if self.ring else slot
        held = held.where((held >= 0) & (held < position), -1)
        return (*self._read(rows), held)

    def _read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.read(self.keys[:, : self._in_use]), rows.read(self.values[:, : self._in_use])

    def append_many(
        self, key: Tensor, value: Tensor, lens: Tensor | None, rows: Rows = ALL_ROWS
    ) -> None:
        """Add the first lens[r] positions of (rows, length, heads, head_dim) to row r; None: all.

        Where a kernel does it the host waits for nothing.
        """
        length, lens = key.shape[1], rows.lens(lens, key.shape)
        self.reserve(length)
        if self._takes_kernel(key, value, rows):
            from h_net_dynamic_chunking.ops._triton.append import append

            append(key, value, self.keys, self.values, self.position, lens, self.ring)
        else:
            self._append_some(key, value, lens, rows)
        self.positions.advance(length if lens is None else lens, length, rows)

    def _takes_kernel(self, key: Tensor, value: Tensor, rows: Rows) -> bool:
        tensors = (key, value, self.keys, self.values, self.position)
        return (
            rows.index is None
            and key.dtype == self.keys.dtype
            and all(tensor.is_contiguous() for tensor in tensors)
            and uses_triton(key, moves_only=True)
        )

    def _append_some(self, key: Tensor, value: Tensor, lens: Tensor | None, rows: Rows) -> None:
        """On torch, for which rows and positions are listed; on a GPU the host waits for that."""
        length, position = key.shape[1], rows.read(self.position)
        if lens is None:
            lens = torch.full_like(position, length)
        t = torch.arange(length, device=key.device)
        kept = t < lens[:, None]
        if self.ring:  # of more positions than slots, the last
            kept = kept & (t >= lens[:, None] - self.slots)
        slot = position[:, None] + t
        slot = slot % self.slots if self.ring else slot
        row, step = kept.nonzero(as_tuple=True)
        index = rows.indices(len(key), key.device)[row]
        for cached, new in ((self.keys, key), (self.values, value)):
            cached[index, slot[row, step]] = new[row, step].to(cached.dtype)
