"""One layer of a stack: a mixer, perhaps an MLP, each on the residual stream through a norm."""

import inspect
from typing import Any

from torch import Tensor, nn

from h_net_dynamic_chunking import step_module
from h_net_dynamic_chunking.cache import ALL_ROWS, Rows
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm


class Block(nn.Module):
    """Add a mixer, then perhaps an MLP, to the residual stream; each sees it through its norm.

    h, out: (batch, length, d_model), float32 or float64; packed (total, d_model) with `cu_seqlens`,
            which goes on to the mixer, as does `max_seqlen` if the mixer's forward names it
    """

    def __init__(self, mixer: nn.Module, d_model: int, mlp: SwiGLU | None = None) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.mixer = mixer
        # Without an MLP both stay None, and so leave no key in the state dict.
        self.norm2 = RMSNorm(d_model) if mlp is not None else None
        self.mlp = mlp
        self.lengths = _lengths_named_by(mixer)  # dynamo cannot trace the inspection

    def forward(
        self, h: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        lengths: dict[str, Any] = {}
        if cu_seqlens is not None:
            offers = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            lengths = {name: offers[name] for name in self.lengths}
        return self._add_mlp(h + self.mixer(self.norm1(h), **lengths))

    def step(self, h: Tensor, cache: Any, rows: Rows = ALL_ROWS) -> Tensor:
        """One position: h, out (rows, d_model)."""
        return self._add_mlp(h + step_module.step("mixer", self.mixer, self.norm1(h), cache, rows))

    def extend(self, h: Tensor, cache: Any, lens: Tensor | None, rows: Rows = ALL_ROWS) -> Tensor:
        """The next positions: h, out (rows, length, d_model)."""
        return self._add_mlp(
            h + step_module.extend("mixer", self.mixer, self.norm1(h), cache, lens, rows)
        )

    def _add_mlp(self, h: Tensor) -> Tensor:
        if self.norm2 is not None and self.mlp is not None:
            h = h + self.mlp(self.norm2(h))
        return h


def _lengths_named_by(mixer: nn.Module) -> list[str]:
    """Which of `cu_seqlens` and `max_seqlen` the mixer's forward names."""
    mixer = getattr(mixer, "_orig_mod", mixer)  # torch.compile hides the signature behind *args
    names = inspect.signature(mixer.forward).parameters
    return [name for name in ("cu_seqlens", "max_seqlen") if name in names]
