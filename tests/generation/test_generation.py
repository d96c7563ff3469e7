"""generate() on scripted models: what comes back, what the model is asked, and what is refused."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import generate
from h_net_dynamic_chunking.decoding import Decoding
from h_net_dynamic_chunking.generation import Generated, TextPiece
from h_net_dynamic_chunking.sampling import Sampling
from h_net_dynamic_chunking.stopping import StopStrings
from tests.generation.mock_model import BOS, EOS, VOCAB, MockModel, hashed, scripted, uniform
from tests.support import assert_close

TEXTS = {"a": b"n apple", "the": b" naive one", "x": b"", "mark": b" one. two \xe6\xbc\xa2!"}
PROMPTS = list(TEXTS)
WANTED = list(TEXTS.values())


def test_each_row_is_continued_to_its_own_end() -> None:
    model = scripted(**TEXTS)
    results = generate(model, PROMPTS, 40, seed=0)
    assert results == WANTED
    assert all(result.finish_reason == "eos" for result in results)
    assert generate(model, [prompt.encode() for prompt in PROMPTS], 40, seed=1) == WANTED


def test_what_the_model_is_asked() -> None:
    """Prompts behind BOS, padded on the right; then the rows that are left; never the last byte."""
    model = scripted(**TEXTS)
    generate(model, PROMPTS, 40, plan="masked")
    ((ids, lens),) = model.prefills
    assert lens.tolist() == [1 + len(prompt) for prompt in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        assert ids[row, : lens[row]].tolist() == [BOS, *prompt.encode()]
    assert ids.shape == (4, 5)
    assert model.allocated == [(4, 5 + 40)]
    # One step for each byte of the longest row, and EOS is read by none.
    assert len(model.steps) == max(map(len, WANTED))
    for step, (ids, active, plan) in enumerate(model.steps):
        assert plan == "masked"
        assert active.tolist() == [step < len(text) for text in WANTED]
        for row in active.nonzero().flatten().tolist():
            assert ids[row].tolist() == [WANTED[row][step]]


def test_the_model_is_told_of_the_states() -> None:
    model = scripted(**TEXTS)
    for stream in (False, True):
        list(generate(model, PROMPTS, 4, state_dtype=torch.bfloat16, stream=stream))
        assert model.state_dtype == torch.bfloat16
        list(generate(model, PROMPTS, 4, stream=stream))
        assert model.state_dtype is None


def test_length_is_a_limit() -> None:
    model = scripted(**TEXTS)
    results = generate(model, PROMPTS, 7)
    assert results == [text[:7] for text in WANTED]
    reasons = [result.finish_reason for result in results]
    assert reasons == ["length", "length", "eos", "length"]
    # The last byte is not read: nobody asks what would come after it.
    assert len(model.steps) == 6


def test_nothing_to_write_does_not_run_the_model() -> None:
    model = scripted(**TEXTS)
    assert generate(model, PROMPTS, 0) == [b""] * 4
    assert generate(model, [], 10) == []
    assert list(generate(model, PROMPTS, 0, stream=True)) == []
    assert not model.allocated


def test_one_prompt_alone_and_an_empty_one() -> None:
    assert generate(scripted(the=b" end"), "the", 9) == [b" end"]
    assert generate(scripted(the=b" end"), b"the", 9) == [b" end"]
    assert len(generate(uniform(), [""], 9, eos=False)[0]) == 9


def test_without_bos_and_eos() -> None:
    """Both are bytes like any other then."""
    model = scripted(a=b"b")
    assert generate(model, ["a"], 4, add_bos=False, eos=False) == [b"b" + bytes([EOS] * 3)]
    assert model.prefills[0][0].tolist() == [[ord("a")]]


def test_stop_strings_are_cut_and_count_only_in_new_bytes() -> None:
    texts = {"a.": b".b..c", "d": b"ef\n\ng", "h": b"ij"}
    model = scripted(**texts)
    results = generate(model, list(texts), 9, stop=["..", b"\n\n"], logprobs=True)
    assert results == [b".b", b"ef", b"ij"]
    assert [result.finish_reason for result in results] == ["stop", "stop", "eos"]
    assert [len(result.logprobs) for result in results] == [2, 2, 2]
    # Rows stop at once: the first one reads .b. and not the stop that ended it.
    assert sum(bool(active[0]) for _, active, _ in model.steps) == 3
    assert generate(model, ["d"], 4, stop="\n\n") == [b"ef"]
    assert generate(model, ["d"], 3, stop="\n\n") == [b"ef\n"]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_is_the_same_alone_and_in_a_batch(temperature: float) -> None:
    prompts = ["one", "", "three and more", "4"]
    options = {"temperature": temperature, "top_p": 0.9, "repetition_penalty": 1.1, "eos": False}
    together = generate(hashed(), prompts, 30, seed=5, **options)
    assert len(set(together)) == 4
    for row, prompt in enumerate(prompts):
        assert generate(hashed(), [prompt], 30, seed=5 + row, **options) == [together[row]]
    reordered = generate(hashed(), prompts[::-1], 30, seed=[8, 7, 6, 5], **options)
    assert reordered == together[::-1]
    # A shorter text is the start of a longer one.
    assert generate(hashed(), prompts, 11, seed=5, **options) == [row[:11] for row in together]


def test_seeds() -> None:
    assert (
        generate(uniform(), ["", ""], 9, seed=[3, 3], eos=False)[0]
        == (generate(uniform(), [""], 9, seed=3, eos=False)[0])
    )
    torch.manual_seed(0)
    first = generate(uniform(), ["a"], 9)
    assert generate(uniform(), ["a"], 9) != first
    torch.manual_seed(0)
    assert generate(uniform(), ["a"], 9) == first


def test_log_probabilities_are_those_of_the_model() -> None:
    """Whatever the filters; against the logits that the script gives for the same bytes."""
    model = hashed()
    options = {"temperature": 0.3, "top_k": 5, "repetition_penalty": 2.0, "seed": 0}
    for result in generate(model, ["ab", "c"], 12, logprobs=True, eos=False, **options):
        row = 0 if result == generate(model, ["ab"], 12, eos=False, **options)[0] else 1
        read = [BOS, *[b"ab", b"c"][row]]
        wanted = []
        for value in result:
            wanted.append(model.next_logits(read).log_softmax(-1)[value])
            read.append(value)
        assert_close("logprobs", result.logprobs, torch.stack(wanted))
    assert generate(model, ["ab"], 12)[0].logprobs is None


def test_repetition_penalty_knows_prompt_and_new_bytes() -> None:
    """So strong that no byte comes twice, nor one of the prompt, nor BOS."""
    result = generate(
        MockModel(lambda read: torch.full((VOCAB,), -1.0)),
        [b"\x00\x01", b"\x05\x06\x07\x08"],
        250,
        repetition_penalty=1e6,
        eos=False,
        seed=0,
    )
    for prompt, new in zip(([0, 1, BOS], [5, 6, 7, 8, BOS]), result, strict=True):
        assert len(set(new) | set(prompt)) == 250 + len(prompt)


def test_stream_is_the_text_of_the_list() -> None:
    texts = {"a": "naïve 漢字 🎈".encode(), "b": b"\xff\xe6\xbc", "c": "stöp stop".encode()}
    model = scripted(**texts)
    pieces = list(generate(model, list(texts), 40, stop="stop", stream=True, eos=True))
    assert all(pieces)
    for row, result in enumerate(generate(model, list(texts), 40, stop="stop")):
        text = "".join(piece for piece in pieces if piece.row == row)
        assert text == result.decode(errors="replace")
    # Characters come one by one, each with its last byte.
    assert [str(piece) for piece in pieces if piece.row == 0] == list("naïve 漢字 🎈")


def test_stream_comes_as_it_is_written() -> None:
    model = scripted(a=b"xyz")
    pieces = generate(model, ["a"], 40, stream=True)
    assert not model.prefills
    for count, wanted in enumerate("xyz"):
        assert next(pieces) == wanted
        # Before the model reads it.
        assert len(model.steps) == count
    assert list(pieces) == []


def test_training_mode_is_left_as_it_was() -> None:
    """Module by module, also if the stream is given up or the model fails."""
    model = scripted(a=b"xyz")
    model.train()
    model.inner.eval()

    def modes() -> list[bool]:
        return [module.training for module in model.modules()]

    generate(model, ["a"], 9)
    assert modes() == [True, False]
    pieces = generate(model, ["a"], 9, stream=True)
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert modes() == [True, False]
    model.next_logits = lambda read: torch.full((VOCAB,), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, ["a"], 9)
    assert modes() == [True, False]
    model.eval()
    generate(scripted(a=b"x"), ["a"], 9)
    assert modes() == [False, False]


def test_logits_that_are_not_finite_are_named() -> None:
    def next_logits(read: list[int]) -> torch.Tensor:
        broken = len(read) == 4 and read[1] == ord("b")
        logits = torch.full((VOCAB,), torch.nan if broken else 0.0)
        logits[EOS] = -torch.inf
        return logits

    with pytest.raises(ValueError, match=r"not finite after 2 new bytes of prompts\[1\]"):
        generate(MockModel(next_logits), ["a", "b"], 9)


def test_depths_and_blocks_of_several_steps() -> None:
    """What the command shows: where chunks open, in the prompt, in new bytes and at the last."""
    model = scripted(**TEXTS)
    decoding = Decoding(
        model,
        [prompt.encode() for prompt in PROMPTS],
        14,
        sampling=Sampling(),
        seeds=range(4),
        stops=StopStrings([]),
        keep_depths=True,
    )
    decoding._steps_a_look = 4  # as on an accelerator
    blocks = list(decoding.blocks())
    contents = [b"".join(rows) for rows in zip(*(b.contents for b in blocks), strict=True)]
    assert contents == WANTED
    assert [len(block.contents[3]) for block in blocks] == [4, 4, 4, 2]
    assert [block.active for block in blocks][-2:] == [[False] * 3 + [True], [False] * 4]
    # BOS opened the first chunk.
    assert [depth.tolist() for depth in decoding.prompt_depths] == [[0] * len(p) for p in PROMPTS]
    depths = [torch.cat(rows).tolist() for rows in zip(*(b.depths for b in blocks), strict=True)]
    assert depths[1] == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert depths[3] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0]


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(scripted(**TEXTS), PROMPTS, 40, progress=True) == WANTED
    assert "/160" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = scripted(**TEXTS)
    with pytest.raises(ImportError, match=r"pip install 'h-net-dynamic-chunking\[train\]'"):
        generate(model, PROMPTS, 40, progress=True)
    assert not model.prefills


def test_results_travel() -> None:
    """Through pickle and copy, as themselves."""
    result = Generated(b"new", "stop", torch.tensor([-1.0, -2.0, -3.0]))
    piece = TextPiece("new", 3)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again == b"new"
        assert again.finish_reason == "stop"
        assert torch.equal(again.logprobs, result.logprobs)
    assert pickle.loads(pickle.dumps(piece)).row == copy.copy(piece).row == 3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (3, {}, "prompts must be bytes, str or a sequence"),
        (["a", 3], {}, r"prompts\[1\] must be bytes or str, got int"),
        (["a", "\ud800"], {}, r"prompts\[1\] is no text that UTF-8 can encode"),
        (["a", ""], {"add_bos": False}, "prompts: row 1 is empty"),
        (["a"], {"max_new_bytes": -1}, "max_new_bytes must be an int of at least 0, got -1"),
        (["a"], {"max_new_bytes": 2.0}, "max_new_bytes must be an int of at least 0, got 2.0"),
        (["a"], {"temperature": -1}, "temperature must be a finite number of at least 0"),
        (["a"], {"stop": ["x", ""]}, "stop must have no empty string"),
        (["a"], {"stop": [1]}, r"stop\[0\] must be bytes or str, got int"),
        (["a"], {"seed": [1, 2]}, "seed must be an int or one for each of 1 rows, got a list of 2"),
        (["a"], {"seed": 1.5}, "seed must be an int or one for each of 1 rows, got 1.5"),
        (["a"], {"plan": "fast"}, "plan must be one of auto, compact, masked, waiting, got 'fast'"),
        (["a"], {"state_dtype": torch.int8}, "state_dtype must be torch.float32, .*got torch.int8"),
        (["a"], {"stream": True, "logprobs": True}, "logprobs must be False with stream"),
    ],
)
def test_bad_arguments_are_named_before_the_model_runs(prompts, options, message) -> None:
    for stream in (False, True):
        model = scripted(a=b"b")
        arguments = {"max_new_bytes": 5, "stream": stream} | options
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, **arguments)
        assert not model.allocated


@pytest.mark.parametrize("model", [None, "models/hnet_1stage_L", torch.nn.Linear(2, 2)])
def test_other_models_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"model must be an HNetLM, got {type(model).__name__}"):
        generate(model, "a", 5)


def test_other_vocabularies_are_refused() -> None:
    model = uniform()
    model.config.vocab_size = 26
    with pytest.raises(ValueError, match="model must have a vocabulary of 256 bytes, got 26"):
        generate(model, ["a"], 3)
