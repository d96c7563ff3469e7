"""Rows that wait for each other write what they write in lock-step."""

from itertools import islice
from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import HNetLM, generate
from h_net_dynamic_chunking.decoding import Block, Decoding
from h_net_dynamic_chunking.sampling import Sampling
from h_net_dynamic_chunking.stopping import StopStrings
from h_net_dynamic_chunking.waiting import depths, usual_periods
from tests.inference.models import random_ids, random_model

PROMPTS = [bytes(row[: 1 + 2 * r].tolist()) for r, row in enumerate(random_ids(5, 12))]
NEW = 24


def blocks(model: HNetLM, plan: str, periods: list[int] | None, look: int = 1) -> list[Block]:
    """With bytes drawn at temperature 1, a stop string of one byte, and EOS."""
    decoding = Decoding(
        model,
        PROMPTS,
        NEW,
        sampling=Sampling(),
        seeds=range(5),
        stops=StopStrings([b"\x07"]),
        plan=plan,
        keep_logprobs=True,
        periods=periods,
    )
    decoding._steps_a_look = look
    return list(decoding.blocks())


def texts(of: list[Block]) -> list[bytes]:
    return [b"".join(row) for row in zip(*(block.contents for block in of), strict=True)]


@pytest.mark.parametrize(
    ("name", "periods"),
    [
        ("one_stage", [1]),
        ("one_stage", [4]),
        ("three_stages", [2, 1, 3]),
        ("three_stages", [1, 2, 2]),
        ("three_stages", None),
    ],
)
def test_the_bytes_of_lock_step(name: str, periods: list[int] | None) -> None:
    model = random_model(name)
    want, got = blocks(model, "compact", None), blocks(model, "waiting", periods, look=5)
    assert texts(got) == texts(want)
    assert len(set(map(len, texts(want)))) > 1  # some rows end early
    for row in range(len(PROMPTS)):
        logprobs = [torch.cat([block.logprobs[row] for block in of]) for of in (got, want)]
        torch.testing.assert_close(*logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "eos": False},
        {
            "top_k": 20,
            "repetition_penalty": 1.2,
            "stop": ["a", b"\x00\x01"],
            "seed": [9, 8, 7, 6, 5],
        },
    ],
)
def test_generate(options: dict[str, Any]) -> None:
    """Options of every kind, alone and in a batch, and as a stream."""
    model = random_model("three_stages")
    options = {"seed": 1, "logprobs": True} | options
    want = generate(model, PROMPTS, NEW, **options)
    got = generate(model, PROMPTS, NEW, plan="waiting", **options)
    assert got == want
    assert [row.finish_reason for row in got] == [row.finish_reason for row in want]
    seed = options["seed"] if isinstance(options["seed"], list) else [1, 2, 3, 4, 5]
    alone = generate(model, PROMPTS[3:4], NEW, plan="waiting", **options | {"seed": seed[3:4]})
    assert alone == want[3:4]
    streaming = options | {"logprobs": False, "stream": True, "plan": "waiting"}
    pieces = list(generate(model, PROMPTS, NEW, **streaming))
    for row, text in enumerate(want):
        joined = "".join(piece for piece in pieces if piece.row == row)
        assert joined == text.decode(errors="replace")


def test_networks_inside_run_once_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """And step every row that waits then, however often it has been passed by."""
    model = random_model("one_stage")
    network, ran = model.backbone.network, []
    original = network.step

    def step(x: Any, caches: Any, rows: Any) -> Any:
        ran.append(int(rows.active.sum()))
        return original(x, caches, rows=rows)

    monkeypatch.setattr(network, "step", step)
    looks = blocks(model, "waiting", [3])
    assert len(ran) == len(looks) // 3
    assert max(ran[: len(ran) // 2]) > 1


def test_depths() -> None:
    assert list(islice(depths([1, 2]), 4)) == [1, 2, 1, 2]
    assert list(islice(depths([2, 1]), 4)) == [0, 2, 0, 2]
    assert list(islice(depths([3, 2]), 12)) == 2 * [0, 0, 1, 0, 0, 2]


def test_usual_periods_are_lengths_of_chunks() -> None:
    """Of the outermost stage, four fifths."""
    model, ids = random_model("three_stages"), random_ids(2, 12)
    cache = model.allocate_inference_cache(2, 12)
    assert usual_periods(cache.backbone) == [1, 1, 1]  # nothing is known
    every = [(torch.arange(12) % 4 == 0).expand(2, -1), torch.tensor([[True, False, False]] * 2)]
    model(ids, boundary_masks=every, inference_params=cache)
    assert usual_periods(cache.backbone)[:2] == [3, 3]


def test_what_cannot_wait_is_refused() -> None:
    with pytest.raises(ValueError, match="'waiting' where there is no stage"):
        generate(random_model("isotropic"), PROMPTS, NEW, plan="waiting")
    options: dict[str, Any] = {"seeds": range(5), "stops": StopStrings([]), "sampling": Sampling()}
    with pytest.raises(ValueError, match="'waiting' where depths are kept"):
        Decoding(
            random_model("one_stage"), PROMPTS, NEW, plan="waiting", keep_depths=True, **options
        )
