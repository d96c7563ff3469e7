"""Self-speculation: the text of the model, whatever is guessed; caches that go back."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from h_net_dynamic_chunking import HNetLM, generate
from h_net_dynamic_chunking.cache import tensors_of
from h_net_dynamic_chunking.lm_inference import InferenceCache
from h_net_dynamic_chunking.sampling import Sampling, distribution
from h_net_dynamic_chunking.speculation import (
    Speculated,
    Speculation,
    SpeculationStatistics,
    generate_speculative,
)
from h_net_dynamic_chunking.stopping import StopStrings
from tests.inference.models import random_ids, random_model
from tests.support import assert_close

CPU = torch.device("cpu")
BOS, EOS = 254, 255
PROMPTS = [b"", b"the prompt", bytes(range(200))]


def with_threshold(name: str, threshold: float) -> HNetLM:
    """A model whose outermost router opens a chunk over this probability."""
    model = random_model(name)
    model.backbone.chunker.boundary_threshold = threshold
    return model


@pytest.mark.parametrize("draft", [1, 3, 8])
@pytest.mark.parametrize("name", ["one_stage", "three_stages"])
def test_greedy_text_is_that_of_generate(name: str, draft: int) -> None:
    """Guesses are kept and refused on the way."""
    model = with_threshold(name, 0.4)
    kept = refused = 0
    for prompt in PROMPTS:
        (want,) = generate(model, prompt, 24, temperature=0, eos=False)
        got = generate_speculative(model, prompt, 24, draft=draft, temperature=0, eos=False)
        assert got == want
        assert got.finish_reason == want.finish_reason == "length"
        kept += got.statistics.kept
        refused += got.statistics.drafted - got.statistics.kept
    assert kept > 0
    assert refused > 0


def test_the_distribution_is_that_of_the_model() -> None:
    """Chi-square over all texts of two bytes, of which the second is a guess."""
    model, options, count = with_threshold("one_stage", -1.0), Sampling(0.3, top_k=3), 300
    prompt = [BOS, *b"zz"]
    with torch.no_grad():
        # A main network that says less, so that guesses are right at times.
        model.backbone.network.rmsnorm.weight *= 0.5
        firsts = chances(model(torch.tensor([prompt])).logits[0, -1:], options)[0]
        bytes_ = firsts.nonzero().flatten().tolist()
        texts = torch.tensor([[*prompt, byte] for byte in bytes_])
        seconds = chances(model(texts).logits[:, -1], options)
        guesses = chances(drafted_logits(model, prompt, bytes_), options)
    exact = firsts[bytes_, None] * seconds
    possible = exact > 0
    assert possible.sum() == 9

    seen = torch.zeros_like(exact)
    kept = 0
    for seed in range(count):
        text = generate_speculative(
            model, b"zz", 2, draft=1, temperature=0.3, top_k=3, seed=seed, eos=False
        )
        seen[bytes_.index(text[0]), text[1]] += 1
        assert text.statistics.drafted == text.statistics.verifications == 1
        kept += text.statistics.kept
    assert 0 < kept < count
    assert seen[~possible].sum() == 0
    critical = 31.8  # the 99.99% point for 8 degrees of freedom
    assert chi_square(seen, count * exact) < critical
    # It would show if refusals were forgotten, or made good from p instead of max(p - q, 0).
    assert chi_square(count * firsts[bytes_, None] * guesses, count * exact) > 2 * critical
    agreed = torch.minimum(seconds, guesses)
    from_p = firsts[bytes_, None] * (agreed + (1 - agreed.sum(1, keepdim=True)) * seconds)
    assert chi_square(count * from_p, count * exact) > 2 * critical


def chi_square(seen: Tensor, expected: Tensor) -> Tensor:
    """Over the outcomes that are possible."""
    possible = expected > 0
    return ((seen - expected)[possible].square() / expected[possible]).sum()


def chances(logits: Tensor, options: Sampling) -> Tensor:
    """float64 (rows, vocab)."""
    return distribution(logits, options.parameters(1, CPU)).double()


def drafted_logits(model: HNetLM, prompt: list[int], following: list[int]) -> Tensor:
    """What the outer networks say after each byte alone, on the last chunk of the prompt."""
    rows = len(following)
    cache = model.allocate_inference_cache(rows, len(prompt) + 1)
    model(torch.tensor([prompt]).expand(rows, -1), inference_params=cache)
    closed = torch.zeros(rows, dtype=torch.bool)
    return model.step(torch.tensor(following), cache, boundary_masks=[closed]).logits[:, 0]


@pytest.mark.parametrize("name", ["one_stage", "three_stages"])
def test_a_refusal_leaves_the_cache_of_what_was_kept(name: str) -> None:
    """After each round the cache is as if it had read the text and nothing else."""
    model = with_threshold(name, 0.4)
    speculation = Speculation(model, 30, 4, Sampling(0.5), 0, StopStrings([]), eos=False)
    prompt = [BOS, *b"some text"]
    speculation.read_prompt(prompt)
    rereads = 0
    while True:
        speculation.go_on()
        if speculation.ended:
            break
        fresh = model.allocate_inference_cache(1, len(prompt) + 30)
        model(torch.tensor([[*prompt, *speculation.written]]), inference_params=fresh)
        assert_same_cache(speculation.cache, fresh)
        rereads = speculation.statistics.rereads
    assert rereads > 1


def assert_same_cache(got: InferenceCache, want: InferenceCache) -> None:
    for place, (g, w) in enumerate(zip(tensors_of(got), tensors_of(want), strict=True)):
        assert_close(f"tensor {place} of the cache", g, w, 0 if g.dtype == torch.int64 else None)


@pytest.mark.parametrize("name", ["one_stage", "three_stages", "isotropic"])
def test_clones_go_their_own_way(name: str) -> None:
    """Same numbers from the original and the clone, in either order, and a count of their own."""
    model, ids = random_model(name), random_ids(2, 12)
    cache = model.allocate_inference_cache(2, 12)
    model(ids[:, :6], inference_params=cache)
    before = [tensor.clone() for tensor in tensors_of(cache)]
    clone = cache.clone()
    ahead = model(ids[:, 6:], inference_params=clone).logits
    assert clone.positions.seen.tolist() == [12, 12]
    assert clone.positions.bound == 12
    assert all(map(torch.equal, before, tensors_of(cache)))
    again = cache.clone()
    assert torch.equal(model(ids[:, 6:], inference_params=cache).logits, ahead)
    assert torch.equal(model(ids[:, 6:], inference_params=again).logits, ahead)
    # One count for the model and its outermost stage, as in a cache that was allocated.
    if model.config.stages:
        assert clone.positions is clone.backbone.positions
    with pytest.raises(ValueError, match="cache is full"):
        model.step(ids[:, 0], clone)


def test_without_a_chunk_nothing_is_guessed() -> None:
    """Bytes that open none are final: the networks inside never run."""
    model = with_threshold("three_stages", 1.0)
    got = generate_speculative(model, "the prompt", 30, draft=2, seed=1, eos=False)
    # The last byte is not read.
    assert got.statistics == SpeculationStatistics(30, 0, 0, 0, 0, (29, 0, 0, 0))
    assert got.statistics.bytes_per_verification == float("inf")


def test_statistics_where_every_byte_opens_a_chunk() -> None:
    """At temperature 0, against what the text says."""
    model = with_threshold("one_stage", -1.0)
    found = generate_speculative(model, b"ab", 20, draft=3, temperature=0, eos=False).statistics
    assert found.written == 20
    # A verification adds a sure byte, what is kept, and after a refusal one more.
    refusals = 20 - found.verifications - found.kept
    assert found.rereads in (refusals, refusals - 1)  # none after the last byte
    steps = found.calls[0] - found.verifications - found.rereads
    assert steps == found.drafted
    assert found.calls[1] == found.verifications + found.rereads
    assert found.share_kept == found.kept / found.drafted
    assert found.bytes_per_verification == 20 / found.verifications


def test_where_a_text_ends() -> None:
    """By length, stop string and EOS; in sure bytes, guesses and replacements, as in generate."""
    model = with_threshold("one_stage", 0.4)
    (whole,) = generate(model, b"", 30, temperature=0, eos=False)
    for end in range(1, 12):
        stop = whole[end - 1 : end + 1]
        got = generate_speculative(model, b"", 30, draft=3, temperature=0, eos=False, stop=stop)
        assert (got, got.finish_reason) == (whole[: whole.index(stop)], "stop")
        short = generate_speculative(model, b"", end, draft=3, temperature=0, eos=False)
        assert (short, short.finish_reason) == (whole[:end], "length")
    # EOS takes the place of a byte of the text.
    last = whole[20]
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[[EOS, last]] = weight[[last, EOS]]
    got = generate_speculative(model, b"", 30, draft=3, temperature=0)
    assert (got, got.finish_reason) == (whole[: whole.index(last)], "eos")
    empty = generate_speculative(model, b"a", 0)
    assert (empty, empty.finish_reason, empty.statistics.calls) == (b"", "length", (0, 0))


def test_seeds_and_modes() -> None:
    """A seed gives the same text again, and the model is left in the mode that it was in."""
    model = random_model("one_stage").train()
    first, again, other = (
        generate_speculative(model, "ab", 30, draft=3, seed=seed, eos=False) for seed in (5, 5, 6)
    )
    assert first == again != other
    assert model.training
    assert model.backbone.training


def test_results_travel() -> None:
    text = Speculated(b"new", "stop", SpeculationStatistics(3, 2, 1, 1, 1, (4, 2)))
    for same in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
        assert same == b"new"
        assert (same.finish_reason, same.statistics) == ("stop", text.statistics)


@pytest.mark.parametrize(
    ("name", "prompt", "options", "message"),
    [
        ("isotropic", "a", {}, "model must have a chunker to speculate"),
        ("one_stage", "a", {"draft": 0}, "draft must be an int of at least 1, got 0"),
        ("one_stage", "a", {"draft": True}, "draft must be an int of at least 1, got True"),
        ("one_stage", 3, {}, "prompt must be bytes or str, got int"),
        ("one_stage", "", {"add_bos": False}, "row 0 is empty"),
        ("one_stage", "a", {"max_new_bytes": -1}, "max_new_bytes must be an int of at least 0"),
        (
            "one_stage",
            "a",
            {"temperature": -1},
            "temperature must be a finite number of at least 0",
        ),
        ("one_stage", "a", {"top_k": 0}, "top_k must be None or an int of at least 1"),
        ("one_stage", "a", {"stop": [""]}, "stop must have no empty string"),
        ("one_stage", "a", {"seed": -1}, "seed must be an int in"),
    ],
)
def test_bad_arguments_are_named(name, prompt, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate_speculative(random_model(name), prompt, **{"max_new_bytes": 3} | options)


def test_logits_that_are_not_finite_are_named() -> None:
    model = random_model("one_stage")
    (first,) = generate(model, b"ab", 1, temperature=0, eos=False)
    with torch.no_grad():
        model.embeddings.weight[first[0]] = torch.nan
    with pytest.raises(ValueError, match="not finite after 1 new bytes of the prompt"):
        generate_speculative(model, b"ab", 5, temperature=0, eos=False)
