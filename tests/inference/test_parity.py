"""Teacher-forced: whatever the pieces, a model that remembers gives the logits of one forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from h_net_dynamic_chunking import HNetLM
from h_net_dynamic_chunking.cache import tensors_of
from tests.inference.models import CONFIGS, random_ids, random_model
from tests.support import assert_close

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")
PLANS = ["compact", "masked"]


def feed(
    model: HNetLM, ids: Tensor, pieces: list[list[int]], plan: Any = "compact"
) -> tuple[Tensor, list[list[list[Tensor]]]]:
    """Logits (batch, length, vocab) of the texts in pieces, and each stage's boundaries by row.

    Row r takes pieces[r][i] bytes in call i. Calls of at most one byte in each row are steps; the
    pads of the others hold any bytes.
    """
    device = ids.device
    cache = model.allocate_inference_cache(len(ids), ids.shape[1])
    done = [0] * len(ids)
    logits: list[list[Tensor]] = [[] for _ in ids]
    boundaries: list[list[list[Tensor]]] = [[[] for _ in range(model.config.stages)] for _ in ids]
    for lens in zip(*pieces, strict=True):
        piece = ids.new_full((len(ids), max(lens)), 77)
        for row, n in enumerate(lens):
            piece[row, :n] = ids[row, done[row] : done[row] + n]
        if max(lens) == 1:
            active = torch.tensor(lens, device=device) > 0
            out = model.step(piece, cache, active=active, plan=plan)
        else:
            out = model(piece, lens=torch.tensor(lens, device=device), inference_params=cache)
        for row, n in enumerate(lens):
            logits[row].append(out.logits[row, :n])
            done[row] += n
            for s, stage in enumerate(out.stages):
                mask = stage.boundary_mask[row].reshape(-1)
                boundaries[row][s].append(mask.sum())
    assert done == [ids.shape[1]] * len(ids)
    return torch.stack([torch.cat(row) for row in logits]), boundaries


def assert_parity(
    model: HNetLM, ids: Tensor, pieces: list[list[int]], plan: str = "compact", **bound: float
) -> None:
    with torch.no_grad():
        want = model(ids)
    got, boundaries = feed(model, ids, pieces, plan)
    assert_close("logits", got, want.logits, **bound)
    for row, stages in enumerate(boundaries):
        for counts, stage in zip(stages, want.stages, strict=True):
            assert int(sum(counts)) == int(stage.boundary_mask[row].sum())


# 21 bytes in three rows: at once, byte by byte, at different paces, and with rows that wait.
PIECES = [
    [[21], [21], [21]],
    [[1] * 21] * 3,
    [[9, *[1] * 12, 0], [1, *[1] * 12, 8], [0, *[1] * 12, 9]],
    [[1, 5, 0, 15], [20, 0, 0, 1], [7, 7, 7, 0]],
    [[1, 1, 19], [1, 0, 20], [0, 1, 20]],
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pieces", PIECES, ids=["whole", "steps", "ragged", "pieces", "starts"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_and_steps_equal_forward(name: str, pieces: list[list[int]], plan: str) -> None:
    """In float64, past the windows, in every row of a batch."""
    assert_parity(random_model(name), random_ids(3, 21), pieces, plan)


@needs_golden
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["one_stage", "two_stage"])
def test_golden_models(name: str, plan: str) -> None:
    """fp32 within 1e-4: prompts that end on a boundary and off one, then steps, then a piece."""
    model = HNetLM.from_official(
        GOLDEN / f"{name}.json", GOLDEN / f"{name}.weights.pt", dtype=torch.float32
    )
    text = torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)["ids_0"][None].long()
    with torch.no_grad():
        want = model(text)
    mask, length = want.stages[0].boundary_mask[0], text.shape[1]
    on = int(mask[5:].nonzero()[0]) + 6
    off = int((~mask[5:]).nonzero()[0]) + 6
    ids = text.expand(3, -1)
    steps = length - max(on, off) - 3
    firsts = [on, off, 1]
    pieces = [[n, *[1] * steps, length - n - steps] for n in firsts]
    got, _ = feed(model, ids, pieces, plan)
    for row in got:
        assert (row - want.logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_long_text_of_all_bytes(name: str) -> None:
    """Over several chunks of the scan, all 256 values, float32 within 1e-4."""
    model = random_model(name, torch.float32)
    ids = random_ids(2, 300)
    assert_parity(model, ids, [[256, *[1] * 30, 14], [3, *[1] * 30, 267]], tolerance=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_at_rest_keep_every_bit(plan: Any) -> None:
    """Row 1 is not active for some steps, whatever its input."""
    model, ids = random_model("three_stages"), random_ids(3, 12)
    cache = model.allocate_inference_cache(3, 12)
    model(ids[:, :6], inference_params=cache)
    before = [tensor[1].clone() for tensor in tensors_of(cache)]
    active = torch.tensor([True, False, True])
    for t in range(6, 12):
        out = model.step(ids[:, t], cache, active=active, plan=plan)
        assert (out.logits[1] == 0).all()
    for old, tensor in zip(before, tensors_of(cache), strict=True):
        assert torch.equal(old, tensor[1])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("part", ["embeddings", "backbone.network.network"])
def test_parts_of_another_dtype(part: str, plan: str) -> None:
    """What runs forward decodes: some wide weights in a float32 model, near their own numbers."""
    model = random_model("three_stages", torch.float32)
    model.get_submodule(part).double()
    assert_parity(model, random_ids(3, 21), PIECES[2], plan)


def test_plans_decide_the_same() -> None:
    """Also where nothing is decided: in rows at rest, and inside where no chunk opened."""
    model, ids = random_model("three_stages"), random_ids(3, 12)
    caches = [model.allocate_inference_cache(3, 12) for _ in PLANS]
    active = torch.tensor([True, False, True])
    for t in range(12):
        outs = [
            model.step(ids[:, t], cache, active=active if t > 6 else None, plan=plan)
            for cache, plan in zip(caches, PLANS, strict=True)
        ]
        for one, other in zip(*(out.stages for out in outs), strict=True):
            assert_close("probs", one.probs, other.probs)
            assert torch.equal(one.boundary_mask, other.boundary_mask)


def test_given_boundaries() -> None:
    """Steps and pieces take masks as forward does."""
    model, ids = random_model("three_stages"), random_ids(2, 12)
    given = torch.arange(12) % 3 == 0
    with torch.no_grad():
        want = model(ids, boundary_masks=[given.expand(2, -1)])
    cache = model.allocate_inference_cache(2, 12)
    first = model(ids[:, :5], boundary_masks=[given[:5].expand(2, -1)], inference_params=cache)
    outs = [first.logits]
    for t in range(5, 12):
        masks = [given[t].expand(2)]
        outs.append(model.step(ids[:, t], cache, boundary_masks=masks).logits)
    assert_close("logits", torch.cat(outs, 1), want.logits)


@pytest.mark.parametrize("form", ["padded", "packed", "jagged"])
def test_given_boundaries_inside(form: str) -> None:
    """Pieces take the masks of all stages in the form of the ids, as forward does."""
    model, ids = random_model("three_stages"), random_ids(2, 12)
    outer = torch.arange(12) % 3 == 0
    inner = torch.tensor([True, False, True, True])
    masks = [outer.expand(2, -1), inner.expand(2, -1)]
    options: dict[str, Any] = {}
    if form != "padded":
        masks, options = [mask.flatten() for mask in masks], {"cu_seqlens": torch.arange(3) * 12}
        ids = ids.flatten()
    if form == "jagged":
        ids, options = torch.nested.nested_tensor_from_jagged(ids, options["cu_seqlens"]), {}
    cache = model.allocate_inference_cache(2, 12)
    with torch.no_grad():
        want = model(ids, boundary_masks=masks, **options)
    got = model(ids, boundary_masks=masks, inference_params=cache, **options)
    values = [out.logits.values() if form == "jagged" else out.logits for out in (got, want)]
    assert_close("logits", *values)
    assert got.stages[1].boundary_mask.flatten().tolist() == inner.repeat(2).tolist()


def test_packed_and_jagged_pieces() -> None:
    """The forms that forward takes without a cache, and the same forms come out."""
    model, ids = random_model("one_stage"), random_ids(2, 12)
    with torch.no_grad():
        want = model(ids).logits
    cache = model.allocate_inference_cache(2, 12)
    packed = torch.cat([ids[0, :7], ids[1, :2]])
    out = model(packed, cu_seqlens=torch.tensor([0, 7, 9]), inference_params=cache)
    assert_close("packed", out.logits, torch.cat([want[0, :7], want[1, :2]]))
    jagged = torch.nested.as_nested_tensor([ids[0, 7:], ids[1, 2:]], layout=torch.jagged)
    out = model(jagged, inference_params=cache)
    assert_close("jagged", out.logits.values(), torch.cat([want[0, 7:], want[1, 2:]]))


PLACES = [
    "backbone",
    "backbone.encoder",
    "backbone.network",
    "backbone.network.network.network",
    "backbone.decoder.layers.0.mixer",
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", ["compile", "checkpoint"])
def test_wrapped_parts(wrapper: str, place: str, plan: str) -> None:
    """torch.compile and activation checkpointing hide classes, and methods from the class."""
    model = random_model("three_stages")
    part = model.get_submodule(place)
    # Eager, because what is compiled is forward alone.
    wrapped = (
        torch.compile(part, backend="eager") if wrapper == "compile" else checkpoint_wrapper(part)
    )
    model.set_submodule(place, wrapped)
    got, _ = feed(model, random_ids(3, 21), PIECES[2], plan)
    with torch.no_grad():
        want = random_model("three_stages")(random_ids(3, 21)).logits
    assert_close("logits", got, want)
