"""The kernel that chooses the next byte, beside `sampling.draw` and what `decoding` makes of it."""

import pytest
import torch

from h_net_dynamic_chunking.decoding import EOS, NO_DISTRIBUTION
from h_net_dynamic_chunking.sampling import Parameters, draw
from tests.support import generator

pytest.importorskip("triton", None if torch.cuda.is_available() else "3.7")

from h_net_dynamic_chunking.ops._triton.choose_step import choose_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, VOCAB = 3, 256


# The interpreter is numpy, which says so when a number overflows or is none, as some here must.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("eos", "reads_last"), [(None, False), (EOS, True)])
def test_choices(eos: int | None, reads_last: bool) -> None:
    """Several temperatures, ties, impossible bytes, EOS, and logits that are none.

    Rows have written different numbers of bytes; one has ended, and one has no logits.
    """
    logits = torch.randn(9, VOCAB, generator=generator())
    logits[1, [7, 70]] = 9.0  # a tie, in a greedy row
    logits[2, :250] = -torch.inf
    logits[3, EOS] = 50.0
    logits[4, 5] = torch.nan
    logits[5, 5] = torch.inf
    logits = logits.to(DEVICE)
    temperature = torch.tensor([[1.0], [0], [1], [1], [1], [1], [0.3], [1e-30], [5]], device=DEVICE)
    uniforms = torch.rand(9, STEPS, generator=generator(1)).to(DEVICE)
    uniforms[8] = 1 - 2.0**-24
    active = torch.tensor([True] * 6 + [False] + [True] * 2, device=DEVICE)
    turns = active & (torch.arange(9, device=DEVICE) != 8)
    written = torch.tensor(
        [1, 1, 0, 1, 1, 1, 1, 2, 1], device=DEVICE
    )  # row 7 is full with one more
    ids, reads = torch.full((9, 1), -7, dtype=torch.int64, device=DEVICE), active.clone()
    values = torch.full((9, STEPS), -7, dtype=torch.int16, device=DEVICE)
    logprobs = torch.full((9, STEPS), -7.0, device=DEVICE)
    rows, before = torch.arange(9, device=DEVICE), written.clone()

    want = draw(logits, uniforms[rows, written, None], Parameters(temperature))
    went_on = active.clone()
    choose_step(
        logits,
        uniforms,
        temperature,
        turns,
        written,
        went_on,
        reads,
        ids,
        values,
        logprobs,
        eos=eos,
        reads_last=reads_last,
        no_distribution=NO_DISTRIBUTION,
    )
    broken = want.logprobs.isnan()
    assert broken.nonzero().flatten().tolist() == [4, 5]
    writes = turns & ~(broken | (want.ids == EOS) if eos is not None else broken)
    assert torch.equal(ids[writes, 0], want.ids[writes])
    assert ids[1] == 7
    assert (ids[~turns] == -7).all()
    assert torch.equal(written, before + writes)
    assert torch.equal(went_on, torch.where(turns, writes & (written < STEPS), active))
    assert went_on.tolist()[6:] == [False, False, True]
    assert torch.equal(reads, writes if reads_last else went_on & turns)

    expected = torch.full_like(values, -7)
    expected[rows[writes], before[writes]] = want.ids[writes].to(torch.int16)
    expected[rows[broken], before[broken]] = NO_DISTRIBUTION
    assert torch.equal(values, expected)
    at = logprobs[rows, before]
    torch.testing.assert_close(at[turns], want.logprobs[turns], equal_nan=True, rtol=0, atol=1e-5)
    assert int((logprobs != -7).sum()) == int(turns.sum())


def test_frequencies() -> None:
    """60,000 draws of six bytes: within five standard deviations of their probabilities."""
    rows = 60_000 if DEVICE == "cuda" else 600
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    logits = torch.full((rows, 16), -torch.inf)
    logits[:, :6] = probs.log() / 2  # at temperature 0.5
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
    active = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    choose_step(
        logits.to(DEVICE),
        torch.rand(rows, 1, generator=generator()).to(DEVICE),
        torch.full((rows, 1), 0.5, device=DEVICE),
        active.clone(),
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        active,
        active.clone(),
        ids,
        torch.zeros(rows, 1, dtype=torch.int16, device=DEVICE),
        torch.zeros(rows, 1, device=DEVICE),
        eos=None,
        reads_last=False,
        no_distribution=NO_DISTRIBUTION,
    )
    counts = torch.bincount(ids.flatten().cpu(), minlength=16)[:6]
    deviation = (rows * probs * (1 - probs)).sqrt()
    assert ((counts - rows * probs).abs() < 5 * deviation).all()
