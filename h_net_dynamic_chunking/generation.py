"""generate: continue prompts, each at its own pace, as bytes or as text that streams.

As in the official code, the model reads BOS = 254 before a prompt and ends a row with EOS = 255.
Neither occurs in valid UTF-8.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from h_net_dynamic_chunking.decoding import Block, Decoding, SteppingModel
from h_net_dynamic_chunking.sampling import Sampling, row_seeds
from h_net_dynamic_chunking.stopping import StopFilter, StopStrings
from h_net_dynamic_chunking.utf8 import Utf8Decoder

FinishReason = Literal["eos", "stop", "length"]
Text = bytes | bytearray | str


class Generated(bytes):
    """The new bytes of a row, which are bytes in every respect, and how they came about."""

    finish_reason: FinishReason
    """"eos": the model wrote EOS; "stop": a stop string; "length": there was no more room."""
    logprobs: Tensor | None
    """float32 (bytes,) on the CPU, if asked for: log-probability of each byte in nats, as the model
    has it: before any filter and at temperature 1."""

    def __new__(
        cls, content: bytes, finish_reason: FinishReason, logprobs: Tensor | None = None
    ) -> "Generated":
        self = super().__new__(cls, content)
        self.finish_reason = finish_reason
        self.logprobs = logprobs
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return bytes(self), self.finish_reason, self.logprobs


class TextPiece(str):
    """Some characters of a row, which are a str in every respect."""

    row: int
    """The prompt that they continue."""

    def __new__(cls, content: str, row: int) -> "TextPiece":
        self = super().__new__(cls, content)
        self.row = row
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.row


@overload
def generate(
    model: SteppingModel,
    prompts: Sequence[Text] | Text,
    max_new_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[Text] | Text | None = None,
    eos: bool = True,
    add_bos: bool = True,
    logprobs: bool = False,
    stream: Literal[False] = False,
    plan: str = "auto",
    state_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[Generated]: ...


@overload
def generate(
    model: SteppingModel,
    prompts: Sequence[Text] | Text,
    max_new_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[Text] | Text | None = None,
    eos: bool = True,
    add_bos: bool = True,
    logprobs: bool = False,
    stream: Literal[True],
    plan: str = "auto",
    state_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Iterator[TextPiece]: ...


def generate(
    model: SteppingModel,
    prompts: Sequence[Text] | Text,
    max_new_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[Text] | Text | None = None,
    eos: bool = True,
    add_bos: bool = True,
    logprobs: bool = False,
    stream: bool = False,
    plan: str = "auto",
    state_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[Generated] | Iterator[TextPiece]:
    """Continue each prompt by up to `max_new_bytes` bytes.

    Args:
        model: an HNetLM. It runs in eval mode and without gradients, and is left as it was.
        prompts: bytes, or str for their UTF-8, in a sequence; one alone is a sequence of one.
        max_new_bytes: most bytes to add to a prompt; 0 adds none and does not run the model.
        temperature: divides the logits; 0 takes the most probable byte, the lowest of several.
        top_k: keep the k most probable bytes.
        top_p: keep the fewest most probable bytes that have this probability together.
        min_p: keep bytes at least this many times as probable as the most probable one.
        repetition_penalty: divides positive logits of bytes that the row has read or written, and
            multiplies negative ones. The filters apply in the order penalty, temperature, top_k,
            top_p, min_p.
        seed: row r draws from seed + r, or from its own entry of a sequence, so that a row gives
            the same bytes alone and in a batch. Rounding is the exception: products of another
            batch size may round otherwise, which tells in bfloat16 where two bytes, or p and the
            threshold, are close. None takes seeds from torch's global generator.
        stop: one string or several that end a row and are cut from it. Only new bytes count.
        eos: whether EOS ends a row. It is never part of the result then.
        add_bos: whether the model reads BOS before each prompt. Without, no prompt may be empty.
        logprobs: whether results have log-probabilities; a stream has none.
        stream: yield text as it comes instead of returning all at the end.
        plan: "compact" or "masked": how `model.step` treats rows that open no chunk; "waiting":
            rows that open one wait for others, so that the networks inside run less often. The
            bytes are the same. "auto" takes what is fastest: on a GPU, several rows wait.
        state_dtype: what Mamba-2 layers keep their states in from byte to byte; None is float32.
            With many rows on a GPU, torch.bfloat16 or torch.float16 saves time, at the cost of
            accuracy: see `HNetLM.allocate_inference_cache`.
        progress: show a bar of the bytes written so far on stderr (tqdm).

    Returns:
        The new bytes of each prompt, in their order. With `stream`, an iterator of pieces of text,
        each with the `.row` that it continues; all pieces of a row together are
        `result.decode(errors="replace")`, and no piece ends within a character or holds the start
        of a stop string.

    Raises:
        ValueError: an argument that cannot be, by name, before the model runs; or a model whose
            logits are not finite.
        ImportError: a bar is wanted, and tqdm is not installed.
    """
    if stream and logprobs:
        raise ValueError(
            "logprobs must be False with stream: a piece of text has no place for them"
        )
    rows = prompt_bytes(prompts)
    stops = StopStrings(stop_bytes(stop))
    decoding = Decoding(
        model,
        rows,
        max_new_bytes,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seeds=row_seeds(seed, len(rows)),
        stops=stops,
        bos=add_bos,
        eos=eos,
        plan=plan,
        state_dtype=state_dtype,
        keep_logprobs=logprobs,
        each_step=stream,
    )
    blocks = decoding.blocks()
    if progress:
        blocks = _with_bar(blocks, len(rows) * max_new_bytes)
    if stream:
        return _pieces(blocks, [StopFilter(stops) for _ in rows])
    return _collected(blocks, len(rows), stops, max_new_bytes, logprobs)


def finished(content: bytes, stops: StopStrings, max_new_bytes: int) -> tuple[bytes, FinishReason]:
    """All that a row wrote without the stop string at its end, and why it ended."""
    cut = stops.cut(content)
    if cut is not None:
        return cut, "stop"
    return content, "length" if len(content) == max_new_bytes else "eos"


def prompt_bytes(prompts: Sequence[Text] | Text) -> list[bytes]:
    """Each prompt as bytes."""
    return [
        utf8_bytes(f"prompts[{row}]", prompt)
        for row, prompt in enumerate(_several("prompts", prompts))
    ]


def stop_bytes(stop: Sequence[Text] | Text | None) -> list[bytes]:
    """Each stop string as bytes."""
    several = [] if stop is None else _several("stop", stop)
    stops = [utf8_bytes(f"stop[{i}]", string) for i, string in enumerate(several)]
    if b"" in stops:
        raise ValueError("stop must have no empty string, which would end a row before it begins")
    return stops


def utf8_bytes(name: str, text: Text) -> bytes:
    """One text as bytes."""
    if isinstance(text, (bytes, bytearray)):
        return bytes(text)
    if not isinstance(text, str):
        raise ValueError(f"{name} must be bytes or str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no text that UTF-8 can encode: {error.reason}") from error


def _collected(
    blocks: Iterator[Block], rows: int, stops: StopStrings, max_new_bytes: int, logprobs: bool
) -> list[Generated]:
    contents = [bytearray() for _ in range(rows)]
    pieces: list[list[Tensor]] = [[torch.empty(0)] for _ in range(rows)]
    for block in blocks:
        for content, new in zip(contents, block.contents, strict=True):
            content += new
        for row, piece in zip(pieces, block.logprobs or [], strict=False):
            row.append(piece)
    results = []
    for written, row in zip(contents, pieces, strict=True):
        new, reason = finished(bytes(written), stops, max_new_bytes)
        kept = torch.cat(row)[: len(new)].clone() if logprobs else None
        results.append(Generated(new, reason, kept))
    return results


def _pieces(blocks: Iterator[Block], filters: list[StopFilter]) -> Iterator[TextPiece]:
    decoders = [Utf8Decoder() for _ in filters]
    going = [True] * len(filters)
    for block in blocks:
        for row in [row for row, goes_on in enumerate(going) if goes_on]:
            ended = not block.active[row]
            text = decoders[row].feed(filters[row].feed(block.contents[row], ended))
            if ended:
                text += decoders[row].flush()
            if text:
                yield TextPiece(text, row)
        going = block.active


def _with_bar(blocks: Iterator[Block], total: int) -> Iterator[Block]:
    """The same blocks, and a bar that counts their bytes."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: tqdm is missing: pip install 'h-net-dynamic-chunking[train]'"
        ) from error

    def counted() -> Iterator[Block]:
        with tqdm(total=total, unit="B", unit_scale=True) as bar:
            for block in blocks:
                bar.update(sum(map(len, block.contents)))
                yield block

    return counted()


def _several(name: str, value: Any) -> Sequence[Text]:
    if isinstance(value, (bytes, bytearray, str)):
        return [value]
    if not isinstance(value, Sequence):
        raise ValueError(f"{name} must be bytes, str or a sequence of them, got {value!r}")
    return value
