"""Causal self-attention as the official H-Net stacks use it: the paper's layer T without its MLP.

Bias-free, softmax(q k^T / sqrt(head_dim)) v, rotary positions on the first channels of each head,
an optional window to the left. Positions are those of the sequence given: inside an H-Net a stage
counts its own chunks. The work is done by torch's own kernels; which one, `CausalAttention` says.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.cache import (
    ALL_ROWS,
    Rows,
    check_cache_class,
    check_cache_tensor,
)
from h_net_dynamic_chunking.layers._checks import (
    check_extension,
    check_input,
    check_sizes,
    check_step_input,
)
from h_net_dynamic_chunking.layers._packed import longest
from h_net_dynamic_chunking.layers.attention_cache import AttentionCache
from h_net_dynamic_chunking.ops.packing import cu_seqlens_of_rows
from h_net_dynamic_chunking.ops.plain import parameter_of
from h_net_dynamic_chunking.ops.rotary import rotary, rotary_from, rotate
from h_net_dynamic_chunking.ops.tail import zero_tail

# Of torch's attention over packed sequences: 2.10 has the argument is_causal in its place.
_VARLEN_HAS_WINDOW = torch.__version__ >= "2.11"


def _varlen() -> Callable[..., Any]:
    """torch's attention over packed sequences.

    Imported at the first use, because it takes a second that only a GPU gains from.
    """
    from torch.nn.attention.varlen import varlen_attn

    return cast(Callable[..., Any], varlen_attn)


class CausalAttention(nn.Module):
    """Let each position attend to itself and to those before it.

    x:           (batch, length, d_model), float; with cu_seqlens packed, (total, d_model)
    cu_seqlens:  (batch + 1,), int32 or int64: cumulative lengths of packed sequences. Rows from
                 cu_seqlens[-1] on may hold anything and come out as zeros
    max_seqlen:  the longest of the packed sequences, or more. None reads it, which stops the host
    has_tail:    False says that there are no rows from cu_seqlens[-1] on, which saves copies
    tail_is_zero: whether x is known to hold zeros behind the last sequence, which saves one of them
    out:         shape of x, dtype of `out_proj`'s result

    Packed sequences, and windows in padded ones, go through `varlen_attn` where that can run, which
    is on a GPU in half precision: its gradients may differ in their last bits from run to run. All
    else goes through `scaled_dot_product_attention`, packed sequences one after the other.

    Args:
        d_model: width of the input.
        num_heads: number of heads; must divide d_model.
        rotary_dim: channels of each head that carry positions, even; 0 for none, None for half of
            the head (rounded down to an even number).
        rotary_base: base of the geometric row of angles.
        window_size: how many positions to the left are kept besides the own one; -1 keeps all.

    Raises:
        ValueError: sizes out of these ranges, an input of another shape, a cache that is full or
            of another batch size or dtype.

    `Wqkv` has the rows [all q; all k; all v], each (head, channel), as in official checkpoints.

    >>> mixer = CausalAttention(64, num_heads=4, window_size=15)
    >>> mixer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        window_size: int = -1,
    ) -> None:
        check_sizes(d_model=d_model, num_heads=num_heads)
        if d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model = {d_model}, got {num_heads}")
        head_dim = d_model // num_heads
        if rotary_dim is None:
            rotary_dim = head_dim // 4 * 2
        if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
            raise ValueError(
                f"rotary_dim must be even and at most the head's {head_dim} channels, "
                f"got {rotary_dim}"
            )
        if rotary_base <= 0:
            raise ValueError(f"rotary_base must be positive, got {rotary_base}")
        if window_size < -1:
            raise ValueError(f"window_size must be -1 (no window) or more, got {window_size}")
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.rotary_dim, self.rotary_base, self.window_size = rotary_dim, rotary_base, window_size
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        has_tail: bool = True,
        tail_is_zero: bool = False,
    ) -> Tensor:
        check_input(x, self.d_model, cu_seqlens)
        if cu_seqlens is not None and has_tail and not tail_is_zero:
            # The gradient of the weights multiplies whatever is there by zero.
            x = zero_tail(x, cu_seqlens)
        q, k, v = rotary(
            self.Wqkv(x), self.num_heads, self.rotary_dim, self.rotary_base, cu_seqlens
        )
        if cu_seqlens is None and self._sees_all(x.shape[1]):
            mixed = self._attend(q, k, v)
        elif cu_seqlens is None:
            mixed = self._attend_from_start(q, k, v)
        elif self._varlen_can_run(q):
            mixed = self._attend_varlen(q, k, v, cu_seqlens, max_seqlen)
            # The kernels write nothing to the tail. In the gradients `rotary` does.
            mixed = zero_tail(mixed, cu_seqlens) if has_tail else mixed
        else:
            mixed = self._attend_one_by_one(q, k, v, cu_seqlens)
        return self._merge(mixed)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> AttentionCache:
        """A cache for `step` and `extend` before the first position.

        It takes `max_seqlen` positions, and with a window that is shorter any number. `dtype` is
        that of the x to come; the weights' if None.
        """
        check_sizes(batch_size=batch_size, max_seqlen=max_seqlen)
        weight = parameter_of(self.Wqkv)
        return AttentionCache.empty(
            weight, batch_size, max_seqlen, self._heads, self.window_size, dtype
        )

    def check_inference_cache(
        self,
        cache: Any,
        batch_size: int,
        dtype: torch.dtype,
        new: int = 1,
        rows: Rows = ALL_ROWS,
        lens: Tensor | None = None,
    ) -> None:
        """Raise ValueError unless the cache is one of this layer for that batch and dtype.

        And unless it has room for `new` more positions of these rows, or lens[r] of row r.
        """
        check_cache_class(cache, AttentionCache, self)
        device = parameter_of(self.Wqkv).device
        for name in ("keys", "values"):
            shape = (batch_size, cache.slots, *self._heads)
            check_cache_tensor(name, getattr(cache, name), shape, dtype, device)
        if cache.ring and cache.slots != self.window_size + 1:
            raise ValueError(
                f"cache must be of this model: {self.window_size + 1} slots, got {cache.slots}"
            )
        cache.positions.check_room(new, rows, lens)

    @torch.no_grad()
    def step(self, x: Tensor, cache: AttentionCache, rows: Rows = ALL_ROWS) -> Tensor:
        """The next position of every row; updates `cache` in place. No gradients.

        x, out:  (rows, d_model)
        rows:    which rows of the cache these are; see `cache.Rows`

        Raises:
            ValueError: x of another shape, a cache that is full or of another layer, batch size or
                dtype.
        """
        check_step_input(x, self.d_model)
        self._check_cache(cache, x, rows, 1)
        q, k, v = self._project(x, rows.read(cache.position))
        keys, values, used = cache.append(k, v, rows)
        mixed = F.scaled_dot_product_attention(
            q[:, :, None],
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            attn_mask=used[:, None, None],
        )
        return self._merge(mixed[:, :, 0])

    @torch.no_grad()
    def extend(
        self, x: Tensor, cache: AttentionCache, lens: Tensor | None = None, rows: Rows = ALL_ROWS
    ) -> Tensor:
        """The next positions of every row at once; updates `cache` in place. No gradients.

        x, out:  (rows, length, d_model); what stands at pads is not used, and means nothing in out
        lens:    int (rows,): positions of each row, on the left; None: all have `length`
        rows:    which rows of the cache these are; see `cache.Rows`

        Raises:
            ValueError: x of another shape, a cache that is full or of another layer, batch size or
                dtype.
        """
        check_extension(x, self.d_model, lens)
        self._check_cache(cache, x, rows, x.shape[1], lens)
        first = rows.read(cache.position)
        # A NaN in a pad would reach real positions, which give it no weight: pads become zeros.
        q, k, v = rotary_from(
            first, self.Wqkv(x), self.num_heads, self.rotary_dim, self.rotary_base, lens
        )
        if cache.positions.bound == 0:
            mixed = self._attend_from_start(q, k, v)
        else:
            mixed = self._attend_to_history(q, k, v, first, cache, rows)
        cache.append_many(k, v, lens, rows)
        return self._merge(mixed)

    @property
    def _heads(self) -> tuple[int, int]:
        return self.num_heads, self.d_model // self.num_heads

    def _check_cache(
        self, cache: AttentionCache, x: Tensor, rows: Rows, new: int, lens: Tensor | None = None
    ) -> None:
        if rows.checked:
            return
        # How many rows an index stands for is not known here.
        batch_size = x.shape[0] if rows.index is None else cache.keys.shape[0]
        self.check_inference_cache(cache, batch_size, x.dtype, new, rows, lens)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., heads, head_dim) of x (..., d_model), the first two turned."""
        q, k, v = rearrange(self.Wqkv(x), "... (qkv h p) -> qkv ... h p", qkv=3, h=self.num_heads)
        q, k = (rotate(part, position, self.rotary_dim, self.rotary_base) for part in (q, k))
        return q, k, v

    def _merge(self, mixed: Tensor) -> Tensor:
        """(..., heads, head_dim) -> (..., d_model)."""
        projected: Tensor = self.out_proj(mixed.flatten(-2))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention inside one sequence or a batch of them: all (..., length, heads, head_dim)."""
        mask = self._window(q.shape[-3], q.device)
        mixed = F.scaled_dot_product_attention(
            q.transpose(-3, -2),
            k.transpose(-3, -2),
            v.transpose(-3, -2),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return mixed.transpose(-3, -2)

    def _attend_from_start(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`_attend` of (rows, length, heads, head_dim), by the kernels for packed input."""
        rows, length = q.shape[:2]
        if not length or not self._varlen_can_run(q):
            return self._attend(q, k, v)
        if not torch.is_grad_enabled():
            return self._attend_without_gradients(q, k, v)
        ends = cu_seqlens_of_rows(q)
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        return self._attend_varlen(q, k, v, ends, length).view(rows, length, *q.shape[1:])

    def _attend_without_gradients(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `varlen_attn` calls, without the host's time for an operation in Python.

        And, unlike `scaled_dot_product_attention`, never a kernel that is planned for each length.
        """
        length = q.shape[1]
        window = -1 if self._sees_all(length) else self.window_size
        mixed, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            length,
            length,
            0.0,
            window == -1,
            False,
            window_size_left=window,
            window_size_right=0,
        )
        return cast(Tensor, mixed)

    def _attend_to_history(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        cache: AttentionCache,
        rows: Rows,
    ) -> Tensor:
        """Attention of new positions (rows, length, heads, head_dim) to old ones and each other.

        first:  int64 (rows,): the position of the first of them
        """
        position = first[:, None] + torch.arange(q.shape[1], device=q.device)
        keys, values, held = cache.history(rows)
        keys, values = (
            torch.cat((old.to(new.dtype), new), dim=1).transpose(1, 2)
            for old, new in ((keys, k), (values, v))
        )
        key_position = torch.cat((held, position), dim=1)[:, None]  # (rows, 1, slots + length)
        behind = position[..., None] - key_position
        seen = (key_position >= 0) & (behind >= 0)
        if self.window_size != -1:
            seen &= behind <= self.window_size
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=seen[:, None]
        )
        return mixed.transpose(1, 2)

    def _attend_one_by_one(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attention inside each packed sequence: all (total, heads, head_dim)."""
        lens = cu_seqlens.diff().tolist()  # stops the host of a GPU
        sizes = [*lens, q.shape[0] - sum(lens)]
        parts = (torch.split(part, sizes) for part in (q, k, v))
        *sequences, tail = zip(*parts, strict=True)
        # The tail of q holds zeros, and so is its own result.
        return torch.cat([*(self._attend(*sequence) for sequence in sequences), tail[0]])

    def _varlen_can_run(self, q: Tensor) -> bool:
        """Whether `varlen_attn` takes q (total, heads, head_dim) and knows the window."""
        return (
            q.is_cuda
            and q.dtype in (torch.float16, torch.bfloat16)
            and q.shape[0] > 0
            and q.shape[-1] % 8 == 0
            and q.shape[-1] <= 256
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and (self.window_size == -1 or _VARLEN_HAS_WINDOW)
        )

    def _attend_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
    ) -> Tensor:
        """Attention inside each packed sequence, its tail unwritten: (total, heads, head_dim)."""
        if max_seqlen is None:
            max_seqlen = longest(cu_seqlens)
        causal: dict[str, Any] = {"is_causal": True}
        if _VARLEN_HAS_WINDOW:
            causal = {"window_size": (self.window_size, 0)}
        ends = cu_seqlens.to(torch.int32)
        mixed = _varlen()(q, k, v, ends, ends, max_seqlen, max_seqlen, **causal)
        return cast(Tensor, mixed)

    def _sees_all(self, length: int) -> bool:
        """Whether the window reaches past the start, and so is none, which is faster."""
        return self.window_size == -1 or self.window_size >= length - 1

    def _window(self, length: int, device: torch.device) -> Tensor | None:
        """Bool `(length, length)`, True where i - window_size <= j <= i; None if all of j <= i."""
        if self._sees_all(length):
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return seen.triu(-self.window_size)
