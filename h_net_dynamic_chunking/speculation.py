"""generate_speculative: the outermost networks guess ahead, the whole model judges the guesses.

A byte that opens no chunk runs the encoder and the decoder of stage 0 alone, and what they say is
final. A byte that opens one calls for the networks inside. Speculation puts that off:

    draft    goes on with encoder and decoder alone, as if no chunk had opened: bytes b drawn from q
    verify   one call of all networks on the bytes since the last one: p
    keep     each b with probability min(1, p(b) / q(b)); in place of the first that is refused, a
             byte from max(p - q, 0), and what was guessed behind it is forgotten

The text has the distribution of the model, whatever q is (Leviathan et al. 2023, arXiv 2211.17192,
theorem 1), and is the greedy one at temperature 0. It saves a call of the networks inside for every
chunk that opens within kept guesses, costs one for every refusal, and runs the networks outside
twice. benchmarks/RESULTS.md says what comes of it; `generate` is the one to use.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from h_net_dynamic_chunking.config import HNetConfig
from h_net_dynamic_chunking.decoding import BOS, EOS, check_generation, evaluating
from h_net_dynamic_chunking.generation import (
    FinishReason,
    Generated,
    Text,
    finished,
    stop_bytes,
    utf8_bytes,
)
from h_net_dynamic_chunking.h_net_inference import HNetInference
from h_net_dynamic_chunking.lm import HNetLM
from h_net_dynamic_chunking.lm_inference import InferenceCache
from h_net_dynamic_chunking.lm_output import HNetLMOutput
from h_net_dynamic_chunking.ops.plain import parameter_of
from h_net_dynamic_chunking.sampling import (
    Parameters,
    Sampling,
    distribution,
    inverse_cdf,
    row_seeds,
)
from h_net_dynamic_chunking.sequence_module import unwrapped
from h_net_dynamic_chunking.stopping import StopStrings

CPU = torch.device("cpu")


class SpeculationStatistics(NamedTuple):
    """What a text took, behind its prompt."""

    written: int
    """Bytes, with a stop string that was cut, without EOS."""
    drafted: int
    """Bytes that were guessed, EOS among them."""
    kept: int
    """Of those, the ones that the model kept."""
    verifications: int
    """Calls that judged guesses."""
    rereads: int
    """Calls that read what was left after a refusal."""
    calls: tuple[int, ...]
    """How often the networks of each level ran, outermost first, the main network last: on one byte
    of a draft, or on all bytes of a verification or a reread."""

    @property
    def share_kept(self) -> float:
        """Guessed bytes that were kept, of all; NaN without any."""
        return self.kept / self.drafted if self.drafted else float("nan")

    @property
    def bytes_per_verification(self) -> float:
        """Bytes of the text for each verification; infinite without any."""
        return self.written / self.verifications if self.verifications else float("inf")


class Speculated(Generated):
    """The new bytes, and how they came about; `logprobs` is None."""

    statistics: SpeculationStatistics

    def __new__(
        cls, content: bytes, finish_reason: FinishReason, statistics: SpeculationStatistics
    ) -> "Speculated":
        self = cast("Speculated", super().__new__(cls, content, finish_reason))
        self.statistics = statistics
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return bytes(self), self.finish_reason, self.statistics


def generate_speculative(
    model: HNetLM,
    prompt: Text,
    max_new_bytes: int,
    *,
    draft: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[Text] | Text | None = None,
    eos: bool = True,
    add_bos: bool = True,
) -> Speculated:
    """Continue one prompt by up to `max_new_bytes` bytes, as `generate` does, by self-speculation.

    At temperature 0 the bytes are those of `generate`. Else they have the same distribution; which
    ones a seed gives depends on `draft`, too.

    Args:
        model: an HNetLM with a chunker. It runs in eval mode and without gradients.
        prompt: bytes, or a str for its UTF-8.
        max_new_bytes: as in `generate`.
        draft: most bytes to guess, from a byte that opens a chunk on, before the model judges them.
        temperature, top_k, top_p, min_p: as in `generate`; guesses are filtered alike.
        seed: of all random numbers. None takes one from torch's global generator.
        stop, eos, add_bos: as in `generate`.

    Raises:
        ValueError: an argument that cannot be, by name, before the model runs; or a model whose
            logits are not finite.

    >>> from h_net_dynamic_chunking import HNetConfig
    >>> config = HNetConfig.create_reasonable_config(D=[64, 64], arch=["m1", "T1"])
    >>> text = generate_speculative(HNetLM(config), "A chunk ends where ", 16, eos=False)
    >>> len(text), text.finish_reason, text.statistics.written
    (16, 'length', 16)
    """
    content = utf8_bytes("prompt", prompt)
    (row_seed,) = row_seeds(seed, 1)
    return speculate(
        model,
        content,
        max_new_bytes,
        draft=draft,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=row_seed,
        stops=StopStrings(stop_bytes(stop)),
        bos=add_bos,
        eos=eos,
    )


def speculate(
    model: HNetLM,
    prompt: bytes,
    max_new_bytes: int,
    *,
    draft: int,
    sampling: Sampling,
    seed: int,
    stops: StopStrings,
    bos: bool,
    eos: bool,
) -> Speculated:
    """`generate_speculative`, of arguments in the form that they have inside."""
    check_generation(model.config, [prompt], max_new_bytes, bos)
    check_speculation(model.config, draft, sampling)
    speculation = Speculation(model, max_new_bytes, draft, sampling, seed, stops, eos)
    if max_new_bytes:
        with evaluating(model.modules()):
            speculation.read_prompt([*([BOS] if bos else []), *prompt])
            while not speculation.ended:
                speculation.go_on()
    new, reason = finished(bytes(speculation.written), stops, max_new_bytes)
    return Speculated(new, reason, speculation.statistics)


class Draft(NamedTuple):
    """New bytes, of which the last may be guesses."""

    content: list[int]
    guesses: list[Tensor]
    """float32 (vocab,): the distribution that each of the last bytes was drawn from. Those before
    are sure: the model itself drew them."""
    ends: bool
    """Whether the text is over with them, so that nothing needs to read the last."""


class Speculation:
    """A text in the making.

    Args:
        model: with a chunker, in eval mode.
        max_new_bytes: most bytes to write.
        draft: most bytes to guess before a verification.
        sampling: how bytes are drawn, without a repetition penalty.
        seed: of the random numbers.
        stops: strings that end the text.
        eos: whether EOS does.
    """

    def __init__(
        self,
        model: HNetLM,
        max_new_bytes: int,
        draft: int,
        sampling: Sampling,
        seed: int,
        stops: StopStrings,
        eos: bool,
    ) -> None:
        self.written = bytearray()
        self.ended = False
        """Whether there is no more to come."""
        self.cache: InferenceCache
        """Has read the prompt and all that is written, until the text ended."""
        self._next: Tensor  # float32 (vocab,), on the CPU: what the next byte is drawn from
        stage = unwrapped(model.backbone)
        assert isinstance(stage, HNetInference)
        self._model = model
        self._threshold = stage.chunker.boundary_threshold
        self._device = parameter_of(model.embeddings).device
        self._closed = torch.zeros(1, dtype=torch.bool, device=self._device)
        self._max_new_bytes = max_new_bytes
        self._draft_length = draft
        # The host needs every byte, so that they are drawn there.
        self._parameters: Parameters = sampling.parameters(1, CPU)
        self._random = torch.Generator().manual_seed(seed)
        self._stops = stops
        self._eos = eos
        self._drafted = self._kept = self._verifications = self._rereads = 0
        self._calls = [0] * (model.config.stages + 1)

    @property
    def statistics(self) -> SpeculationStatistics:
        """So far."""
        return SpeculationStatistics(
            len(self.written),
            self._drafted,
            self._kept,
            self._verifications,
            self._rereads,
            tuple(self._calls),
        )

    def read_prompt(self, ids: list[int]) -> None:
        """Begin, with at least one byte."""
        length = len(ids) + self._max_new_bytes
        self.cache = self._model.allocate_inference_cache(1, length)
        out = self._model(torch.tensor([ids], device=self._device), inference_params=self.cache)
        (self._next,) = self._distributions(out.logits[0, -1:], 0)

    def go_on(self) -> None:
        """Write the bytes of one draft, as far as they are kept, and one more after a refusal."""
        draft = self._guess()
        if draft.guesses:
            self._judge(draft)
        else:
            self._write(draft.content)

    def _guess(self) -> Draft:
        """Draw bytes until one opens a chunk, and guess from there on."""
        cache, following = self.cache.clone(), self._next
        content: list[int] = []
        guesses: list[Tensor] = []
        opened = False
        while True:
            if opened:
                guesses.append(following)
            content.append(self._draw(following))
            ends = self._ends(content)
            if ends or len(guesses) == self._draft_length:
                return Draft(content, guesses, ends)
            ids = torch.tensor(content[-1:], device=self._device)
            # Compact: the steps of a cache that lives this short are not worth recording.
            out = self._model.step(ids, cache, plan="compact", boundary_masks=[self._closed])
            self._count(out)
            opened = opened or bool(out.stages[0].probs > self._threshold)
            (following,) = self._distributions(out.logits[0], len(content))

    def _judge(self, draft: Draft) -> None:
        """Keep what the model keeps."""
        content, sure = draft.content, len(draft.content) - len(draft.guesses)
        ahead = self.cache.clone()
        after = self._read(ahead, content[:-1] if draft.ends else content)
        self._verifications += 1
        self._drafted += len(draft.guesses)
        for place, guess in enumerate(draft.guesses, start=sure):
            true, byte = after[place - 1], content[place]
            if self._uniform() * guess[byte] >= true[byte]:
                self._replace(content[:place], true, guess)
                return
            self._kept += 1
        self.cache, self._next = ahead, after[-1]
        self._write(content)

    def _replace(self, kept: list[int], true: Tensor, guess: Tensor) -> None:
        """Write another byte behind the kept ones, from what `guess` has too little of."""
        missing = (true - guess).clamp(min=0)
        # Nothing is missing where the two differ by rounding.
        content = [*kept, self._draw(missing if missing.any() else true)]
        if not self._ends(content):
            self._next = self._read(self.cache, content)[-1]
            self._rereads += 1
        self._write(content)

    def _write(self, content: list[int]) -> None:
        self.ended = self._ends(content)
        if self._eos and content[-1] == EOS:
            content = content[:-1]
        self.written += bytes(content)

    def _ends(self, content: list[int]) -> bool:
        """Whether the text is over with these bytes behind what is written."""
        if self._eos and content[-1] == EOS:
            return True
        text = bytes(self.written) + bytes(content)
        return len(text) == self._max_new_bytes or self._stops.cut(text) is not None

    def _read(self, cache: InferenceCache, content: list[int]) -> Tensor:
        """Let all networks read the bytes; what follows each, float32 (bytes, vocab)."""
        ids = torch.tensor([content], device=self._device)
        out = self._model(ids, inference_params=cache)
        self._count(out)
        return self._distributions(out.logits[0], 1)

    def _count(self, out: HNetLMOutput) -> None:
        """Which levels ran: each inside a stage that opened a chunk."""
        ran = [True, *(bool(stage.boundary_mask.any()) for stage in out.stages)]
        self._calls = [calls + one for calls, one in zip(self._calls, ran, strict=True)]

    def _distributions(self, logits: Tensor, first: int) -> Tensor:
        """What is drawn from after `first` more bytes than are written, and after each further.

        Raises:
            ValueError: logits (count, vocab) that give no distribution.
        """
        logits = logits.float().cpu()
        broken = ~logits.logsumexp(-1).isfinite()
        if broken.any():
            after = len(self.written) + first + int(broken.int().argmax())
            raise ValueError(
                f"model: its logits are not finite after {after} new bytes of the prompt"
            )
        return distribution(logits, self._parameters)

    def _draw(self, weights: Tensor) -> int:
        """A byte, with probabilities in proportion to the weights (vocab,)."""
        return int(inverse_cdf(weights[None], self._uniform()[None]))

    def _uniform(self) -> Tensor:
        """float32 (1,), in [0, 1)."""
        return torch.rand(1, generator=self._random)


def check_speculation(config: HNetConfig, draft: int, sampling: Sampling) -> None:
    """Raise ValueError unless a model can guess so many bytes that are drawn like this."""
    if not config.stages:
        raise ValueError(
            "model must have a chunker to speculate: an isotropic one has no networks around its "
            "main network that could guess; use generate"
        )
    if isinstance(draft, bool) or not isinstance(draft, int) or draft < 1:
        raise ValueError(f"draft must be an int of at least 1, got {draft!r}")
    if sampling.repetition_penalty != 1:
        raise ValueError(
            "repetition_penalty must be 1 to speculate: it would depend on guesses, "
            f"got {sampling.repetition_penalty}"
        )
