"""Activation checkpointing: a layer keeps what came in, and its backward pass computes the rest."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed once more in the backward pass, with the same numbers.

    Random numbers are drawn again as they were, except while a CUDA graph is recorded.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        backend = chosen_backend()  # the backward pass runs in a thread of its own
        options["context_fn"] = lambda: (nullcontext(), use_backend(backend))
        # The state of a GPU's generator cannot be read while a graph is recorded.
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        options["preserve_rng_state"] = not recording
    return checkpoint(function, *arguments, use_reentrant=False, **options)
