"""How far two byte-level models are apart on one text, in a few numbers.

Prefill is one forward over the prompt, every position compared. Decode continues the prompt
greedily; both models read the bytes that the first one chose, so that a single different choice
does not make all after it incomparable. Each new byte runs the model over the whole text again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.ops.plain import parameter_of

BYTE_VALUES = 256


@dataclass(frozen=True)
class Summary:
    """A tensor of logits."""

    shape: tuple[int, ...]
    dtype: str
    min: float
    max: float
    mean: float
    std: float

    @classmethod
    def of(cls, logits: Tensor) -> "Summary":
        exact = logits.double()
        return cls(
            shape=tuple(logits.shape),
            dtype=str(logits.dtype).removeprefix("torch."),
            min=exact.min().item(),
            max=exact.max().item(),
            mean=exact.mean().item(),
            std=exact.std().item(),
        )


@dataclass(frozen=True)
class Run:
    """What one model made of a text."""

    logits: Tensor
    """(positions, 256), on the CPU, in the dtype of the model."""
    chunk_starts: tuple[frozenset[int], ...]
    """The bytes at which chunks start, one set a stage, outermost first."""


@dataclass(frozen=True)
class Difference:
    """Two runs over the same text."""

    a: Summary
    b: Summary
    max_abs: float
    """Largest difference of two logits."""
    rms: float
    """Root of the mean squared difference."""
    same_boundaries: tuple[float, ...]
    """Share of the chunk starts of either model that both have, one entry a stage."""
    same_greedy_bytes: float
    """Share of the positions at which both find the same byte most likely."""

    @classmethod
    def between(cls, a: Run, b: Run) -> "Difference":
        error = a.logits.double() - b.logits.double()
        same = a.logits.argmax(-1) == b.logits.argmax(-1)
        return cls(
            a=Summary.of(a.logits),
            b=Summary.of(b.logits),
            max_abs=error.abs().max().item(),
            rms=error.square().mean().sqrt().item(),
            # As far in as both models have stages. Byte 0 starts a chunk in every one.
            same_boundaries=tuple(
                len(ours & theirs) / len(ours | theirs)
                for ours, theirs in zip(a.chunk_starts, b.chunk_starts, strict=False)
            ),
            same_greedy_bytes=same.double().mean().item(),
        )


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns."""

    prefill: Difference
    """Over the prompt."""
    decode: Difference
    """Logits over the new bytes; boundaries over the text that the last of them was read from."""
    continuation: bytes
    """The new bytes, as the first model chose them."""


def compare(a: HNetLM, b: HNetLM, prompt: bytes, new_bytes: int) -> Comparison:
    """Run both models over the prompt and over a greedy continuation of it.

    Args:
        a: the model that chooses the new bytes.
        b: the model that it is compared with; it may be on another device and of another dtype.
        prompt: where both start, at least one byte.
        new_bytes: length of the continuation, at least 1.

    Raises:
        ValueError: nothing to read or to write, or a model of something else than bytes.
    """
    if not prompt:
        raise ValueError("prompt must have at least one byte, got none")
    if new_bytes < 1:
        raise ValueError(f"new_bytes must be at least 1, got {new_bytes}")
    for name, model in (("a", a), ("b", b)):
        if model.config.vocab_size != BYTE_VALUES:
            raise ValueError(
                f"{name} must have a vocabulary of {BYTE_VALUES} bytes, "
                f"got {model.config.vocab_size}"
            )
    prefill = Difference.between(_run(a, prompt), _run(b, prompt))
    decode, continuation = _decode(a, b, prompt, new_bytes)
    return Comparison(prefill, decode, continuation)


def _decode(a: HNetLM, b: HNetLM, prompt: bytes, new_bytes: int) -> tuple[Difference, bytes]:
    text = prompt
    rows_a: list[Tensor] = []
    rows_b: list[Tensor] = []
    for _ in range(new_bytes):
        run_a, run_b = _run(a, text), _run(b, text)
        # Clones, because a row alone would keep the logits of the whole text alive.
        rows_a.append(run_a.logits[-1].clone())
        rows_b.append(run_b.logits[-1].clone())
        text += bytes([int(rows_a[-1].argmax())])
    difference = Difference.between(
        Run(torch.stack(rows_a), run_a.chunk_starts),
        Run(torch.stack(rows_b), run_b.chunk_starts),
    )
    return difference, text[len(prompt) :]


@torch.inference_mode()
def _run(model: HNetLM, text: bytes) -> Run:
    ids = torch.tensor(list(text), device=parameter_of(model.embeddings).device)
    out = model(ids[None])
    # Inner stages count chunks of the stage around them, which two models may cut differently.
    byte_of_position = torch.arange(len(text))
    chunk_starts = []
    for stage in out.stages:
        byte_of_position = byte_of_position[stage.boundary_mask[0].cpu()]
        chunk_starts.append(frozenset(byte_of_position.tolist()))
    return Run(out.logits[0].cpu(), tuple(chunk_starts))
