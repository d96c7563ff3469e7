"""Training windows are functions of seed and step; validation windows tile their slice."""

import pytest
import torch

from h_net_dynamic_chunking.training.batches import training_batch, validation_batches

CONTENT = torch.arange(250).to(torch.uint8)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    batch = training_batch(CONTENT, 4, 16, seed=3, step=7)
    assert batch.shape == (4, 17)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(batch, training_batch(CONTENT, 4, 16, seed=3, step=7))
    assert not torch.equal(batch, training_batch(CONTENT, 4, 16, seed=3, step=8))
    assert not torch.equal(batch, training_batch(CONTENT, 4, 16, seed=7, step=3))


def test_the_first_and_the_last_window_occur() -> None:
    batch = training_batch(CONTENT[:18], 64, 16, seed=0, step=0)
    assert set(batch[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 34, 250])
def test_validation_predicts_every_byte_but_the_first_once(length: int) -> None:
    targets = [rows[:, 1:].flatten() for rows in validation_batches(CONTENT[:length], 4, 16)]
    assert torch.cat(targets).tolist() == list(range(1, length))


def test_a_sample_of_the_validation_windows_is_spread_over_the_content() -> None:
    batches = list(validation_batches(CONTENT, 2, 16, every=4))
    assert torch.cat(batches)[:, 0].tolist() == [0, 64, 128, 192]
    # A content of less than one window is its own sample.
    assert [rows.shape for rows in validation_batches(CONTENT[:9], 2, 16, every=4)] == [(1, 9)]
