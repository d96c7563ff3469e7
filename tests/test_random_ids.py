"""random_jagged_ids: lengths and ids from where they were asked for, refusals."""

import pytest
import torch

from h_net_dynamic_chunking.random_ids import random_jagged_ids


def test_lengths_and_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = random_jagged_ids(200, range(0, 5, 2), vocab_size=4, generator=generator)
    assert {len(document) for document in ids.unbind()} == {0, 2, 4}
    assert ids.values().dtype == torch.int64
    assert ids.values().unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("docs", "slen", "message"),
    [
        (0, range(3), "docs must be an integer of at least 1, got 0"),
        (1, range(0), r"slen must be a range of lengths of at least 0, got range\(0, 0\)"),
        (1, range(-1, 3), "slen must be a range"),
        (1, 5, "slen must be a range .* got 5"),
    ],
)
def test_refusals(docs: int, slen: range, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_jagged_ids(docs, slen)
