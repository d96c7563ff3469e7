"""A model whose next byte is a script: what a generation asks of it, without the arithmetic."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

BOS, EOS, VOCAB = 254, 255, 256


class MockModel(nn.Module):
    """Logits that depend on what a row has read, through `next_logits(bytes) -> (256,)`.

    Rows remember what they read in the cache, pads and resting rows give NaN, and every call is
    recorded. A byte opens a chunk at stage 0 if it is a space or the first, and at stage 1 if it
    is the first or follows a full stop and a space.
    """

    def __init__(self, next_logits: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, stages=2)
        self.weight = nn.Parameter(torch.zeros(1))
        self.inner = nn.Dropout()
        self.next_logits = next_logits
        self.allocated: list[tuple[int, int]] = []
        self.prefills: list[tuple[Tensor, Tensor]] = []
        self.steps: list[tuple[Tensor, Tensor, str]] = []
        self.state_dtype: torch.dtype | None = None

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> Any:
        self.allocated.append((batch_size, max_seqlen))
        self.state_dtype = state_dtype
        return SimpleNamespace(rows=[[] for _ in range(batch_size)], max_seqlen=max_seqlen)

    def forward(self, input_ids: Tensor, *, lens: Tensor, inference_params: Any) -> Any:
        self._check_mode()
        self.prefills.append((input_ids.clone(), lens.clone()))
        logits = torch.full((*input_ids.shape, VOCAB), torch.nan)
        masks: list[list[list[bool]]] = [[], []]
        for row, (ids, length) in enumerate(zip(input_ids.tolist(), lens.tolist(), strict=True)):
            opened = []
            for place, value in enumerate(ids[:length]):
                opened.append(self._read(inference_params, row, value))
                logits[row, place] = self.next_logits(inference_params.rows[row])
            masks[0].append([first for first, _ in opened])
            masks[1].append([second for first, second in opened if first])
        return SimpleNamespace(logits=logits, stages=[_stage(rows) for rows in masks])

    def step(self, input_ids: Tensor, cache: Any, *, active: Tensor, plan: str) -> Any:
        self._check_mode()
        self.steps.append((input_ids.clone(), active.clone(), plan))
        logits = torch.full((len(active), 1, VOCAB), torch.nan)
        opened = torch.zeros(2, len(active), dtype=torch.bool)
        for row in active.nonzero().flatten().tolist():
            opened[:, row] = torch.tensor(self._read(cache, row, int(input_ids[row, 0])))
            logits[row, 0] = self.next_logits(cache.rows[row])
        return SimpleNamespace(
            logits=logits, stages=[SimpleNamespace(boundary_mask=mask) for mask in opened]
        )

    def _read(self, cache: Any, row: int, value: int) -> tuple[bool, bool]:
        read = cache.rows[row]
        assert len(read) < cache.max_seqlen, "the cache is full"
        first = not read
        read.append(value)
        return first or value == ord(" "), first or bytes(read[-2:]) == b". "

    def _check_mode(self) -> None:
        assert not self.training
        assert not self.inner.training
        assert not torch.is_grad_enabled()


def _stage(rows: list[list[bool]]) -> Any:
    mask = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return SimpleNamespace(boundary_mask=mask, probs=mask.float())


def scripted(**texts: bytes) -> MockModel:
    """Continues a prompt `name` with texts[name], and that with EOS; all else is improbable."""
    lines = []
    for name, text in texts.items():
        prompt = name.encode(errors="surrogateescape")
        lines.append((prompt, prompt + text))

    def next_logits(read: list[int]) -> Tensor:
        so_far = bytes(read[1:] if read[:1] == [BOS] else read)
        logits = torch.zeros(VOCAB)
        whole = [line for name, line in lines if so_far.startswith(name)]
        following = whole[0][len(so_far) :] if whole else b""
        logits[following[0] if following else EOS] = 30.0
        return logits

    return MockModel(next_logits)


def uniform() -> MockModel:
    """Every byte as probable as any other."""
    return MockModel(lambda read: torch.zeros(VOCAB))


def hashed() -> MockModel:
    """Random logits that depend on all that the row has read."""

    def next_logits(read: list[int]) -> Tensor:
        seed = int.from_bytes(bytes(read[-6:]), "big") + len(read)
        return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))

    return MockModel(next_logits)
