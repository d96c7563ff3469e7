"""What self-speculation gains at batch 1, on a model that was trained for some minutes.

    python benchmarks/speculation.py --data enwik8     a file, or .gz, .xz, .zip of one
    python benchmarks/speculation.py                   the sources of Python's standard library

A small HNetLM of one stage learns the text. Then it continues held-out prompts by `generate` and by
`generate_speculative`, so that the share of guesses that it keeps and the calls of its main network
are those of a model that knows something. All on one CPU thread, whose own seconds count.

What a GPU would gain is predicted from three times: a step of the networks outside (encoder,
decoder, head), the step of the main network that a chunk adds, and a call of all of them on several
bytes. The last is put at the sum of the first two, the least that it can be: the weights are read
once, whatever the bytes. "At best" leaves the main network out of what is read again after a
refusal, as caches of attention that can forget their last positions would allow.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM, __version__, generate
from h_net_dynamic_chunking.speculation import SpeculationStatistics, generate_speculative
from h_net_dynamic_chunking.training.batches import training_batch
from h_net_dynamic_chunking.training.corpus import STANDARD_LIBRARY, open_corpus
from h_net_dynamic_chunking.training.optimizer import adamw, clip_gradients, set_learning_rate
from h_net_dynamic_chunking.training.schedule import Limit, Stopwatch, warmup_stable_decay

Text = TypeVar("Text", bound=bytes)

BATCH, LENGTH, LEARNING_RATE, WEIGHT_DECAY = 4, 512, 2e-3, 0.1
PROMPT = 256
DRAFTS = (1, 2, 4, 8, 16)


def small_model() -> HNetLM:
    """Bytes in chunks of about five, as in the published models of one stage."""
    reasonable = HNetConfig.create_reasonable_config(D=[128, 256], arch=["m2", "T4"])
    sizes = reasonable.to_dict() | {"target_ratio": [5.0], "ssm_cfg": {"d_state": 64}}
    # As in train.py: the paper's weight would not move the boundaries in so few steps.
    return HNetLM(HNetConfig.from_dict(sizes), ratio_loss_weight=0.3)


def train(model: HNetLM, content: Tensor, minutes: float) -> int:
    """Train on uint8 (length,) for so long; returns the steps taken."""
    optimizer = adamw(model.parameter_groups(WEIGHT_DECAY), LEARNING_RATE)
    limit, watch, step = Limit(minutes=minutes), Stopwatch(), 0
    while (progress := limit.progress(step, watch.seconds)) < 1:
        set_learning_rate(optimizer, LEARNING_RATE * warmup_stable_decay(progress))
        windows = training_batch(content, BATCH, LENGTH, 0, step)
        loss = model(windows[:, :-1], windows[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model)
        optimizer.step()
        step += 1
    return step


@torch.no_grad()
def bits_per_byte(model: HNetLM, content: Tensor, chunks: bool = True) -> float:
    """On the first 64 windows of uint8 (length,); without chunks, but for the first of each."""
    windows = content[: 64 * (LENGTH + 1)].view(-1, LENGTH + 1).long()
    only_first = torch.zeros(8, LENGTH, dtype=torch.bool)
    masks = [] if chunks else [only_first]
    losses = [
        float(model(w[:, :-1], w[:, 1:], boundary_masks=masks).cross_entropy)
        for w in windows.split(8)
    ]
    return sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def share_opening(model: HNetLM, prompt: bytes, new: bytes) -> float:
    """New bytes that open a chunk, of all."""
    mask = model(torch.tensor([list(prompt + new)])).stages[0].boundary_mask[0]
    return float(mask[len(prompt) :].float().mean())


def added(parts: list[SpeculationStatistics]) -> SpeculationStatistics:
    *counts, calls = zip(*parts, strict=True)
    levels = tuple(map(sum, zip(*calls, strict=True)))
    return SpeculationStatistics(*map(sum, counts), calls=levels)


def predicted(found: SpeculationStatistics, outer: float, inner: float, best: bool) -> float:
    """Microseconds a byte on a GPU."""
    steps = found.calls[0] - found.verifications - found.rereads
    reread = outer + (0 if best else inner)
    total = steps * outer + found.verifications * (outer + inner) + found.rereads * reread
    return total / found.written


def seconds_of(function: Callable[[], Text]) -> tuple[Text, float]:
    start = time.process_time()
    text = function()
    return text, time.process_time() - start


def rows(
    model: HNetLM, prompts: list[bytes], temperature: float, new: int, outer: float, inner: float
) -> Iterator[list[str]]:
    """A row for `generate`, then one for each length of the draft."""
    options = {"temperature": temperature, "eos": False, "add_bos": False, "seed": 0}
    plain, ahead = [], {draft: [] for draft in DRAFTS}
    for p in prompts:  # in turn, so that all meet the same machine
        plain.append(seconds_of(lambda p=p: generate(model, p, new, **options)[0]))
        for n in DRAFTS:
            run = partial(generate_speculative, model, p, new, draft=n, **options)
            ahead[n].append(seconds_of(run))
    texts = [text for text, _ in plain]
    plain_ms = mean_ms(plain)
    pairs = zip(prompts, texts, strict=True)
    share = sum(share_opening(model, *pair) for pair in pairs) / len(prompts)
    plain_us = outer + share * inner
    name = f"{temperature:g}"
    length = f"{1 / share:.2f}" if share else "none opens"
    yield [name, "none", "", length, f"{share:.3f}", f"{plain_ms:.2f}", "1", "1", "1"]
    for draft, results in ahead.items():
        if not temperature and [text for text, _ in results] != texts:
            print("not the greedy text: float32 rounds a step and a verification differently")
        found = added([text.statistics for text, _ in results])
        gains = [plain_us / predicted(found, outer, inner, best) for best in (False, True)]
        yield [
            "",
            str(draft),
            f"{found.share_kept:.0%}",
            f"{found.bytes_per_verification:.2f}",
            f"{found.calls[1] / found.written:.3f}",
            f"{mean_ms(results):.2f}",
            f"{plain_ms / mean_ms(results):.2f}",
            *(f"{gain:.2f}" for gain in gains),
        ]


def mean_ms(results: list[tuple[Text, float]]) -> float:
    """Milliseconds a byte."""
    return 1e3 * sum(seconds for _, seconds in results) / sum(len(text) for text, _ in results)


def held_out_prompts(content: Tensor, count: int) -> list[bytes]:
    starts = torch.linspace(0, len(content) - PROMPT, count).long().tolist()
    return [bytes(content[start : start + PROMPT].tolist()) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=STANDARD_LIBRARY, help="text to learn")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--prompts", type=int, default=8, help="texts that are continued")
    parser.add_argument("--new", type=int, default=128, help="bytes of each")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.0])
    # hnet_1stage_L on an H200, from RESULTS.md: its main network by the products of its 22 layers,
    # 22.8 us each; the rest of a step of 336 us, in which 0.23 of the bytes opened a chunk.
    parser.add_argument("--inner-us", type=float, default=502, help="main network on a GPU")
    parser.add_argument("--outer-us", type=float, default=221, help="all else on a GPU")
    options = parser.parse_args()

    corpus, _ = open_corpus(options.data, Path())
    training, validation, _ = corpus.split()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = small_model()
    steps = train(model, training, options.minutes)
    model.eval()
    bits = [bits_per_byte(model, validation, chunks) for chunks in (True, False)]
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"ours {__version__}; {steps} steps, {bits[0]:.3f} bits per byte, "
        f"{bits[1]:.3f} without the main network"
    )
    prompts = held_out_prompts(validation, options.prompts)
    header = ["temperature", "draft", "kept", "bytes a verification", "main network a byte"]
    header += ["ms a byte", "gain", "predicted on a GPU", "at best"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    times = (options.outer_us, options.inner_us)
    for temperature in options.temperatures:
        for row in rows(model, prompts, temperature, options.new, *times):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
