"""Boundaries of every stage, brought back to the bytes of ragged rows."""

import torch

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.byte_chunks import byte_chunks
from tests.support import generator


def test_against_the_chunk_lengths_of_a_model() -> None:
    torch.manual_seed(0)
    model = HNetLM(
        HNetConfig.create_reasonable_config(D=[32, 32, 32, 64], arch=["m1", "m1", "m1", "T1"])
    )
    lens = torch.tensor([50, 1, 0, 33])
    ids = torch.randint(256, (4, 50), generator=generator())
    with torch.no_grad():
        out = model(ids, lens=lens)
    chunks = byte_chunks(out.stages, lens, 50)
    assert chunks.depths.max() == 3
    for row, length in enumerate(lens.tolist()):
        ran = set(range(length))
        for stage, record in enumerate(out.stages):
            starts_in_bytes = set()
            place = 0
            for chunk in record.intermediates.absolute_chunk_lens[row].tolist():
                starts_in_bytes |= {place} if chunk else set()
                place += chunk
            opened = (chunks.depths[row] > stage).nonzero().flatten().tolist()
            assert set(opened) == starts_in_bytes
            probs = chunks.probs[stage, row]
            assert set((~probs.isnan()).nonzero().flatten().tolist()) == ran
            assert torch.equal(probs[sorted(ran)], record.probs[row, : len(ran)])
            ran = starts_in_bytes


def test_no_stages() -> None:
    chunks = byte_chunks([], torch.tensor([2, 0]), 3)
    assert chunks.depths.tolist() == [[0, 0, 0]] * 2
    assert chunks.probs.shape == (0, 2, 3)
