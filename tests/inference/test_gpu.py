"""Decoding on a GPU: kernels for few rows and CUDA graphs, against one forward."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetLM, generate
from h_net_dynamic_chunking.ops.backend import Backend, use_backend
from tests.chunker.test_host_reads import host_reads
from tests.inference.models import CONFIGS, random_ids, random_model
from tests.inference.test_parity import feed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Few rows, whose steps may rest, and many, whose steps are one graph.
BATCHES = [3, 20]
LENGTH = 40


def pieces(batch: int) -> list[list[int]]:
    """A prompt, steps in which every fifth row waits, and the rest at once."""
    rows = []
    for row in range(batch):
        prompt = 1 + 3 * row % 11
        steps = [0 if (row + t) % 5 == 0 else 1 for t in range(20)]
        rows.append([prompt, *steps, LENGTH - prompt - sum(steps)])
    return rows


def gpu_model(name: str, dtype: torch.dtype) -> HNetLM:
    return random_model(name, dtype, d_state=16).cuda()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("plan", ["auto", "compact"])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_forward(name: str, plan: str, batch: int, backend: Backend) -> None:
    """float32 within 1e-4, whatever runs the step."""
    model, ids = gpu_model(name, torch.float32), random_ids(batch, LENGTH).cuda()
    with torch.no_grad(), use_backend("torch"):
        want = model(ids)
    with use_backend(backend):
        got, boundaries = feed(model, ids, pieces(batch), plan)
    assert float((got - want.logits).abs().max()) < 1e-4
    for row, stages in enumerate(boundaries):
        for counts, stage in zip(stages, want.stages, strict=True):
            assert int(sum(counts)) == int(stage.boundary_mask[row].sum())


@pytest.mark.parametrize("batch", BATCHES)
def test_caches_that_grow_are_recorded_again(batch: int) -> None:
    """300 chunks of one byte, more than the 256 slots that attention begins with."""
    model, ids = gpu_model("one_stage", torch.float32), random_ids(batch, 300).cuda()
    every = torch.ones(batch, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        want = model(ids, boundary_masks=[every[:, None].expand(-1, 300)]).logits
    cache = model.allocate_inference_cache(batch, 300)
    outs = [
        model.step(ids[:, t], cache, boundary_masks=[every]).logits for t in range(ids.shape[1])
    ]
    assert float((torch.cat(outs, 1) - want).abs().max()) < 1e-4


@pytest.mark.parametrize("batch", BATCHES)
def test_caches_that_a_piece_grows_are_recorded_again(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are not there at once, and 300 bytes are read between two steps."""
    monkeypatch.setattr("h_net_dynamic_chunking.recording._FREE_SHARE", 0)
    model, ids = gpu_model("one_stage", torch.float32), random_ids(batch, 310).cuda()
    every = torch.ones(batch, 310, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        want = model(ids, boundary_masks=[every]).logits
    cache = model.allocate_inference_cache(batch, 310)
    outs = []
    for start, end in [
        *((t, t + 1) for t in range(5)),
        (5, 305),
        *((t, t + 1) for t in range(305, 310)),
    ]:
        piece, given = ids[:, start:end], every[:, start:end]
        if end - start == 1:
            out = model.step(piece, cache, boundary_masks=[given[:, 0]])
        else:
            out = model(piece, boundary_masks=[given], inference_params=cache)
        outs.append(out.logits)
    assert float((torch.cat(outs, 1) - want).abs().max()) < 1e-4


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_16_bits(
    name: str, batch: int, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """Of weights or states, with given boundaries: at most twice the error of steps in torch."""
    exact = gpu_model(name, torch.float32)
    ids = random_ids(batch, LENGTH).cuda()
    stages = exact.config.stages
    masks = [(torch.arange(LENGTH, device="cuda") % 2 == 0).expand(batch, -1)] * min(stages, 1)
    with torch.no_grad():
        want = exact(ids, boundary_masks=masks).logits
    model = gpu_model(name, torch.float32).to(dtype)

    def error(backend: Backend, plan: Any) -> Tensor:
        cache = model.allocate_inference_cache(batch, LENGTH, state_dtype=state_dtype)
        outs = []
        with use_backend(backend):
            for t in range(LENGTH):
                given = [mask[:, t] for mask in masks]
                outs.append(model.step(ids[:, t], cache, plan=plan, boundary_masks=given).logits)
        return (torch.cat(outs, 1).float() - want).square().mean().sqrt()

    assert error("triton", "auto") < 2 * error("torch", "compact") + 1e-6


@pytest.mark.parametrize("batch", BATCHES)
def test_each_step_in_an_autocast_of_its_own(batch: int) -> None:
    """Its casts of the weights are gone after each."""
    model, ids = gpu_model("one_stage", torch.float32), random_ids(batch, 20).cuda()
    outs = []
    for plan in ("auto", "masked", "compact"):
        cache = model.allocate_inference_cache(batch, 20)
        logits = []
        for t in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                given = [torch.full((batch,), t % 2 == 0, device="cuda")]
                out = model.step(ids[:, t], cache, plan=plan, boundary_masks=given)
            logits.append(out.logits)
        assert not cache.graphs
        outs.append(torch.cat(logits, 1).float())
    for got in outs[:2]:
        assert float((got - outs[2]).abs().max()) < 0.05 * float(outs[2].abs().max())


def test_a_cache_is_stepped_by_either_backend() -> None:
    """One step each in turn, on one cache: the one of now, not the one that was recorded."""
    model, ids = gpu_model("one_stage", torch.float32), random_ids(2, 12).cuda()
    cache = model.allocate_inference_cache(2, 12)
    outs = []
    for t in range(12):
        backend: Backend = "triton" if t % 2 else "torch"
        with use_backend(backend):
            outs.append(model.step(ids[:, t], cache).logits)
    assert [backend for backend, _ in cache.graphs] == ["torch", "triton"]
    with torch.no_grad():
        want = model(ids).logits
    assert float((torch.cat(outs, 1) - want).abs().max()) < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", ["auto", "compact"])
def test_a_device_that_is_not_the_current_one(plan: str) -> None:
    model, ids = random_model("one_stage", torch.float32, d_state=16), random_ids(3, LENGTH)
    with torch.no_grad():
        want = model(ids).logits
    got, _ = feed(model.to("cuda:1"), ids.to("cuda:1"), pieces(3), plan)
    assert got.device.index == 1
    assert float((got.cpu() - want).abs().max()) < 1e-4
    texts = generate(model, ["a", "bc"], 64, temperature=0, eos=False, plan=plan)
    assert [len(text) for text in texts] == [64, 64]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_stops_the_host_once_a_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the 256 slots that attention begins with; lengths are read once more."""
    model, ids = gpu_model(name, torch.float32).bfloat16(), random_ids(3, 700).cuda()
    lens = torch.tensor([700, 0, 300], device="cuda")

    def read(**lengths: Tensor) -> None:
        model(ids, inference_params=model.allocate_inference_cache(3, 700), **lengths)

    assert host_reads(read, monkeypatch) == model.config.stages
    assert host_reads(lambda: read(lens=lens), monkeypatch) == model.config.stages + 1


def test_a_row_alone_gives_the_row_in_a_batch() -> None:
    """Greedy bytes, float32: 1 row beside 20."""
    model, ids = gpu_model("three_stages", torch.float32), random_ids(20, 10).cuda()

    def continuation(prompt: Tensor) -> Tensor:
        cache = model.allocate_inference_cache(len(prompt), 60)
        logits = model(prompt, inference_params=cache).logits[:, -1]
        new = []
        for _ in range(40):
            new.append(logits.argmax(-1))
            logits = model.step(new[-1], cache).logits[:, 0]
        return torch.stack(new, 1)

    together = continuation(ids)
    for row in (0, 7, 19):
        assert torch.equal(continuation(ids[row : row + 1])[0], together[row])


def test_graphs_of_before_are_not_freed_while_others_are_recorded() -> None:
    """Python looks for garbage at every turn, and the old graphs are in a circle."""
    model, thresholds = gpu_model("one_stage", torch.float32), gc.get_threshold()
    texts = []
    for _ in range(3):
        circle: list[Any] = [model.allocate_inference_cache(4, 8)]
        circle.append(circle)
        model.step(random_ids(4, 1).cuda(), circle[0])
        del circle
        gc.set_threshold(1)
        try:
            texts.append(generate(model, ["a", "b", "c", "d"], 40, temperature=0, eos=False))
        finally:
            gc.set_threshold(*thresholds)
    assert texts == texts[:1] * 3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_records_its_loop(temperature: float, batch: int) -> None:
    """float32: the bytes of steps that are launched, with a stop string and log-probabilities."""
    model = gpu_model("three_stages", torch.float32)
    prompts = [bytes(row[: 1 + r % 7].tolist()) for r, row in enumerate(random_ids(batch, 8))]
    options: dict[str, Any] = {"seed": 3, "stop": [b"\x07"], "logprobs": True}
    recorded, launched = (
        generate(model, prompts, 80, temperature=temperature, plan=plan, **options)
        for plan in ("auto", "compact")
    )
    assert recorded == launched
    for one, other in zip(recorded, launched, strict=True):
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
