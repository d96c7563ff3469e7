"""`hnet generate --speculate N`: a text by self-speculation, shown when it is complete."""

import base64
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import typer

from h_net_dynamic_chunking.cli.continuation import Settings
from h_net_dynamic_chunking.cli.screen import Screen
from h_net_dynamic_chunking.speculation import Speculated, speculate


def check_speculate(prompts: Sequence[bytes] | None, plan: str, state_dtype: str | None) -> None:
    """Raise ValueError for what --speculate cannot do."""
    if prompts is not None and len(prompts) != 1:
        raise ValueError(f"--speculate takes one prompt, got {len(prompts)}")
    if plan != "auto":
        raise ValueError("--speculate excludes --plan")
    if state_dtype is not None:  # whose roundings depend on what is read at once
        raise ValueError("--speculate excludes --state-dtype")


def write_speculated(
    model: Any,
    prompt: bytes,
    seed: int | None,
    draft: int,
    settings: Settings,
    screen: Screen,
    echo: bool,
    as_json: bool,
) -> None:
    """Continue a prompt, and show what came."""
    seed = secrets.randbelow(2**31) if seed is None else seed
    start = time.perf_counter()
    new = speculate(
        model,
        prompt,
        settings.max_new,
        draft=draft,
        sampling=settings.sampling,
        seed=seed,
        stops=settings.stops,
        bos=settings.bos,
        eos=settings.eos,
    )
    if as_json:
        typer.echo(json.dumps(as_object(prompt, new, seed, time.perf_counter() - start)))
    else:
        screen.plain(((prompt if echo else b"") + new).decode(errors="replace"), end="\n")


def as_object(prompt: bytes, new: Speculated, seed: int, seconds: float) -> dict[str, Any]:
    """Everything, under the names that `Continuation.as_json` has."""
    return {
        "prompt": prompt.decode(errors="replace"),
        "prompt_base64": base64.b64encode(prompt).decode(),
        "text": new.decode(errors="replace"),
        "base64": base64.b64encode(new).decode(),
        "finish_reason": new.finish_reason,
        "seed": seed,
        "seconds": seconds,
        "bytes_per_second": len(new) / seconds,
        "speculation": new.statistics._asdict(),
    }
