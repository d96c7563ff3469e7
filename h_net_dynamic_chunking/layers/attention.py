"""Causal self-attention as the official H-Net stacks use it: the paper's layer T without its MLP.

Bias-free, softmax(q k^T / sqrt(head_dim)) v, rotary positions on the first channels of each head,
an optional window to the left. Positions are those of the sequence given: inside an H-Net a stage
counts its own chunks. No cache and no packed form yet.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from h_net_dynamic_chunking.layers._checks import check_input, check_sizes
from h_net_dynamic_chunking.ops.packing import accumulation_dtype


def rotate(x: Tensor, rotary_dim: int, base: float = 10000.0) -> Tensor:
    """Turn channels i and i + rotary_dim/2 of position t by the angle t * base^(-2i/rotary_dim).

    x:    (batch, length, heads, head_dim), float; positions count from 0
    out:  like x; channels from rotary_dim on are left alone, angles are float32 (float64) inside

    >>> x = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    >>> rotate(x, 2)[0, :, 0]
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    wide, half = accumulation_dtype(x.dtype), rotary_dim // 2
    exponent = torch.arange(half, dtype=wide, device=x.device) * (-2 / max(rotary_dim, 1))
    position = torch.arange(x.shape[1], dtype=wide, device=x.device)
    angle = (position[:, None] * base**exponent)[:, None]  # (length, 1, half)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


class CausalAttention(nn.Module):
    """Let each position attend to itself and to those before it.

    x:    (batch, length, d_model), float
    out:  (batch, length, d_model), dtype of `out_proj`'s result

    Args:
        d_model: width of the input.
        num_heads: number of heads; must divide d_model.
        rotary_dim: channels of each head that carry positions, even; 0 for none, None for half of
            the head (rounded down to an even number).
        rotary_base: base of the geometric row of angles.
        window_size: how many positions to the left are kept besides the own one; -1 keeps all.

    Raises:
        ValueError: sizes out of these ranges, an input of another width.

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

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.d_model)
        q, k, v = rearrange(self.Wqkv(x), "b l (qkv h p) -> qkv b l h p", qkv=3, h=self.num_heads)
        q, k = (rotate(part, self.rotary_dim, self.rotary_base) for part in (q, k))
        mask = self._window(x.shape[1], x.device)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
        )
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _window(self, length: int, device: torch.device) -> Tensor | None:
        """Bool `(length, length)`, True where i - window_size <= j <= i; None if all of j <= i."""
        # A window that reaches past the start is none, and is_causal picks the faster kernels.
        if self.window_size == -1 or self.window_size >= length - 1:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return seen.triu(-self.window_size)
