"""A small HNetLM that learns to chunk runs of letters, in about a minute on a CPU.

    python examples/letter_repetition.py

Every document is the alphabet, each letter up to ten times: "aaccccddd...". Now and then it prints
the cross entropy in nats a byte, the ratio loss (1 where chunks are as long as asked, on average),
bytes per chunk, and a document that was not trained on, its chunks in brackets.
"""

import argparse
import string
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.config import SSMConfig
from h_net_dynamic_chunking.training.optimizer import adamw

DOCUMENTS = 8  # in a step
LEARNING_RATE = 5e-4  # of the main network; the outer stage has its multiple of it
REPORTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    held_out, model = document(), HNetLM(config())
    for step, line in train(model, arguments.steps):
        print(f"step {step}: {line}", flush=True)
        print(bracketed(model, held_out), flush=True)


def config() -> HNetConfig:
    """One stage; a run, where there is one, has 5.5 letters on average."""
    sizes = HNetConfig.create_reasonable_config(D=[64, 128], arch=["m1", "T2"])
    return replace(sizes, target_ratio=(5.5,), ssm_cfg=SSMConfig(d_state=16))


def document() -> bytes:
    """The alphabet, each letter 0 to 10 times."""
    repeats = torch.randint(11, (len(string.ascii_lowercase),)).tolist()
    return "".join(map(str.__mul__, string.ascii_lowercase, repeats)).encode()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Packed documents: ids (total,), the byte after each or -100 (total,), and cu_seqlens."""
    documents = [torch.tensor(list(document())) for _ in range(DOCUMENTS)]
    following = [torch.cat([ids[1:], torch.tensor([-100])]) for ids in documents]
    lens = torch.tensor([0, *map(len, documents)])
    return torch.cat(documents), torch.cat(following), lens.cumsum(0)


def train(model: HNetLM, steps: int) -> Iterator[tuple[int, str]]:
    """Train, and yield the number of a step and what there is to say about it."""
    optimizer = adamw(model.parameter_groups(weight_decay=0.1), LEARNING_RATE)
    for step in range(steps):
        ids, labels, cu_seqlens = batch()
        out = model(ids, labels, cu_seqlens=cu_seqlens)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // REPORTS) == 0 or step == steps - 1:
            length = out.stages[0].bytes_per_chunk.item()
            yield (
                step,
                f"cross entropy {out.cross_entropy.item():.3f}, "
                f"ratio loss {out.ratio_loss.item():.3f}, {length:.2f} bytes per chunk",
            )


@torch.no_grad()
def bracketed(model: HNetLM, text: bytes) -> str:
    """The text with its chunks in brackets: "[aa][cccc]"."""
    starts = model(torch.tensor([list(text)])).stages[0].boundary_mask[0].nonzero().flatten()
    ends = [*starts.tolist()[1:], len(text)]
    return "".join(f"[{text[a:b].decode()}]" for a, b in zip(starts.tolist(), ends, strict=True))


if __name__ == "__main__":
    main()
