"""`samples.txt`: what the chunker cuts held-out text into, and what the model writes."""

import torch
from torch import Tensor

from h_net_dynamic_chunking.training.model import ByteHNet
from h_net_dynamic_chunking.visualize import marked as text_with_marks

MARKS = "·┃"
LEGEND = (
    "· opens a chunk of stage 0, ┃ opens a chunk of stage 1 (and with it one of stage 0); "
    "\N{REPLACEMENT CHARACTER} stands for bytes that are not UTF-8."
)
EXCERPT_BYTES = 512
PROMPT_BYTES = 64
NEW_BYTES = 64
TEMPERATURE = 0.8


def samples_text(model: ByteHNet, held_out: Tensor, seed: int) -> str:
    """Return a marked excerpt of `held_out`, uint8 (length,), and a marked continuation of it."""
    model.eval()
    excerpt = held_out[:EXCERPT_BYTES].long()
    continued = continue_bytes(model, excerpt[:PROMPT_BYTES], NEW_BYTES, seed)
    parts = [
        LEGEND,
        "",
        "--- held-out text",
        marked(model, excerpt),
        "",
        f"--- the first {min(PROMPT_BYTES, len(excerpt))} bytes of it, continued by the model",
        marked(model, continued),
    ]
    model.train()
    return "\n".join(parts) + "\n"


@torch.no_grad()
def marked(model: ByteHNet, content: Tensor) -> str:
    """Return the text of `content`, int64 (length,), with a mark before each chunk."""
    device = next(model.parameters()).device
    prediction = model(content.unsqueeze(0).to(device))
    starts = [_chunk_starts(lens[0]) for lens in prediction.chunk_lens]
    depths = [sum(place in of_stage for of_stage in starts) for place in range(len(content))]
    return text_with_marks(bytes(content.tolist()), depths, MARKS)


@torch.no_grad()
def continue_bytes(model: ByteHNet, prompt: Tensor, count: int, seed: int) -> Tensor:
    """Return `prompt`, int64 (length,), and `count` sampled bytes.

    Every byte runs the model over all bytes before it, which is enough for so short a sample.
    """
    device = next(model.parameters()).device
    # A generator of its own, so that sampling leaves no trace in the training.
    generator = torch.Generator().manual_seed(seed)
    content = prompt
    for _ in range(count):
        logits = model(content.unsqueeze(0).to(device)).logits[0, -1].float().cpu()
        shares = torch.softmax(logits / TEMPERATURE, dim=0)
        content = torch.cat([content, torch.multinomial(shares, 1, generator=generator)])
    return content


def _chunk_starts(lens: Tensor) -> set[int]:
    """Return the first position of each chunk, given their lengths, int (chunks,)."""
    real = lens[lens > 0]
    return set((real.cumsum(0) - real).tolist())
