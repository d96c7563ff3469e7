"""What a run is, but for its length: sizes, rates, seed and the digest of its corpus."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from h_net_dynamic_chunking.config_checks import MAMBA_HEAD_DIM

MAMBAS = ("torch", "mamba-ssm")
ATTENTIONS = ("torch", "flash-attn", "x-transformers")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a byte-level H-Net with two levels of chunks, and of its training.

    Tuples run from the outside in. The defaults are for ten minutes on two cores of a CPU.
    """

    dims: tuple[int, int, int] = (128, 192, 256)  # stage 0, stage 1, main network
    # Stage 0 and 1 have this layout in the encoder and again in the decoder.
    layouts: tuple[str, str, str] = ("m1", "m1", "T4")
    target_ratio: tuple[float, float] = (3.0, 2.0)  # positions in a chunk, per stage
    # Many times the paper's 0.03, which is meant for 200,000 steps: in a run of a thousand steps
    # so weak a pull has not moved the segmentation to its target when the run ends.
    ratio_loss_weight: float = 0.3
    learning_rate: float = 2e-3  # of the main network; outer stages get a multiple of it
    weight_decay: float = 0.1
    batch_size: int = 4
    seq_len: int = 512
    seed: int = 0
    mamba: str = "torch"
    attention: str = "torch"
    corpus_sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and less than 2^63")
        for name, count in (("dims", 3), ("layouts", 3), ("target_ratio", 2)):
            if len(value := getattr(self, name)) != count:
                raise ValueError(f"{name} is {value}; {count} values are wanted")
        if min(self.dims) < 1:
            raise ValueError(f"dims is {self.dims}; each must be at least 1")
        for dim, layout in zip(self.dims, self.layouts, strict=True):
            if not {"m", "M"}.isdisjoint(layout) and 2 * dim % MAMBA_HEAD_DIM:
                raise ValueError(
                    f"dims is {self.dims}; twice each of a stage with Mamba-2 must be a multiple "
                    f"of {MAMBA_HEAD_DIM}, the width of a Mamba-2 head, which 2 * {dim} is not"
                )
        if not all(1 < ratio < math.inf for ratio in self.target_ratio):
            raise ValueError(f"target_ratio is {self.target_ratio}; each must be more than 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be more than 0")
        if not 0 <= self.ratio_loss_weight < math.inf:
            raise ValueError(f"ratio_loss_weight is {self.ratio_loss_weight}; it must be 0 or more")
        if self.mamba not in MAMBAS:
            raise ValueError(f"mamba is {self.mamba!r}; it must be one of {', '.join(MAMBAS)}")
        if self.attention not in ATTENTIONS:
            names = ", ".join(ATTENTIONS)
            raise ValueError(f"attention is {self.attention!r}; it must be one of {names}")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Config":
        """Build one from flags or JSON, which say lists for tuples; other entries are ignored."""
        names = {field.name for field in fields(cls)} & settings.keys()
        values: dict[str, Any] = {}
        for name in names:
            value = settings[name]
            values[name] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the configuration has a value of a wrong type ({error})") from error

    @property
    def bytes_per_chunk(self) -> tuple[float, float]:
        """Target length of a chunk of each stage in bytes, where target_ratio counts positions."""
        outer, inner = self.target_ratio
        return outer, outer * inner

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them, with lists for tuples."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
