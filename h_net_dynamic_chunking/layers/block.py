"""One layer of a stack: a mixer, perhaps an MLP, each on the residual stream through a norm."""

import inspect
from typing import Any

from torch import Tensor, nn

from h_net_dynamic_chunking import step_module
from h_net_dynamic_chunking.cache import ALL_ROWS, Rows
from h_net_dynamic_chunking.layers.mlp import SwiGLU
from h_net_dynamic_chunking.layers.norm import RMSNorm, add_then_norm


class Block(nn.Module):
    """Add a mixer, then perhaps an MLP, to the residual stream; each sees it through its norm.

    What a part adds waits for the norm that comes next, which is one operation with the addition.
    So the stream goes from block to block as a pair, and is the sum of the two.

    h:       (batch, length, d_model), float; packed (total, d_model) with `cu_seqlens`. The mixer
             gets that, `max_seqlen`, `has_tail` and `tail_is_zero`, as far as its forward names
             them
    update:  like h, what is still to be added to it; None for nothing
    out:     the pair h, update after this block; h float32 or float64

    Raises:
        ValueError: mixer is no module, or returns no tensor of the shape of its input.
    """

    def __init__(self, mixer: nn.Module, d_model: int, mlp: SwiGLU | None = None) -> None:
        if not isinstance(mixer, nn.Module):
            raise ValueError(f"mixer must be a torch.nn.Module, got {type(mixer).__name__}")
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.mixer = mixer
        # Without an MLP both stay None, and so leave no key in the state dict.
        self.norm2 = RMSNorm(d_model) if mlp is not None else None
        self.mlp = mlp
        self.lengths = _lengths_named_by(mixer)  # dynamo cannot trace the inspection

    def forward(
        self,
        h: Tensor,
        update: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        has_tail: bool = True,
    ) -> tuple[Tensor, Tensor]:
        lengths: dict[str, Any] = {}
        if cu_seqlens is not None:
            offers = {
                "cu_seqlens": cu_seqlens,
                "max_seqlen": max_seqlen,
                "has_tail": has_tail,
                # The norm leaves zeros there, whatever the stream has.
                "tail_is_zero": True,
            }
            lengths = {name: offers[name] for name in self.lengths}
        masked = cu_seqlens if has_tail else None
        h, normed = add_then_norm(self.norm1, h, update, masked)
        update = self._checked(self.mixer(normed, **lengths), normed)
        return self._then_mlp(h, update, masked)

    def _checked(self, mixed: Any, x: Tensor) -> Tensor:
        """What the mixer made of x; a narrower one would be added all the same, by broadcasting."""
        if isinstance(mixed, Tensor) and mixed.shape == x.shape:
            return mixed
        got = tuple(mixed.shape) if isinstance(mixed, Tensor) else type(mixed).__name__
        raise ValueError(
            f"mixer must return a tensor of the shape of its input, {tuple(x.shape)}; "
            f"{type(self.mixer).__name__} gave {got}"
        )

    def step(self, h: Tensor, cache: Any, rows: Rows = ALL_ROWS) -> Tensor:
        """One position: h, out (rows, d_model)."""
        h = h + step_module.step("mixer", self.mixer, self.norm1(h), cache, rows)
        if self.norm2 is not None and self.mlp is not None:
            h = h + self.mlp(self.norm2(h))
        return h

    def extend(
        self,
        h: Tensor,
        update: Tensor | None,
        cache: Any,
        lens: Tensor | None,
        rows: Rows = ALL_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """The next positions: h, update and out as in `forward`, (rows, length, d_model)."""
        h, normed = add_then_norm(self.norm1, h, update)
        mixed = step_module.extend("mixer", self.mixer, normed, cache, lens, rows)
        return self._then_mlp(h, self._checked(mixed, normed))

    def _then_mlp(
        self, h: Tensor, update: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pair h, update, if there is an MLP on the other side of it."""
        if self.norm2 is not None and self.mlp is not None:
            h, normed = add_then_norm(self.norm2, h, update, cu_seqlens)
            update = self.mlp(normed)
        return h, update


def _lengths_named_by(mixer: nn.Module) -> list[str]:
    """Which of the arguments for packed input the mixer's forward names."""
    mixer = getattr(mixer, "_orig_mod", mixer)  # torch.compile hides the signature behind *args
    names = inspect.signature(mixer.forward).parameters
    offered = ("cu_seqlens", "max_seqlen", "has_tail", "tail_is_zero")
    return [name for name in offered if name in names]
