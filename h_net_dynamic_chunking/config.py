"""HNetConfig: what an HNetLM is, in the official JSON format, with presets of the published models.

The lists run from the outside in. `arch_layout` nests: ["m4", ["T22"], "m4"] is one stage with
encoder and decoder m4 around the main network T22, and the inner list may again have three entries.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h_net_dynamic_chunking.config_checks import (
    check_attention,
    check_integer,
    check_integers,
    check_mamba,
    is_number,
    nested_layout,
    one_entry_each,
    require,
)
from h_net_dynamic_chunking.layers.isotropic import parse_layout
from h_net_dynamic_chunking.layers.mlp import swiglu_width

# How a layout nests: one string alone, or encoder, inner layout, decoder. Kept as tuples.
ArchLayout = Sequence[Any]

# What the official JSON format has no place for.
_NOT_OFFICIAL = ("target_ratio", "ratio_loss_weight", "smoothing_clamp")


@dataclass(frozen=True)
class SSMConfig:
    """Mamba-2, shared by all stages."""

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    chunk_size: int = 256
    """Kept for the official files, and not used. It changes the speed of a scan and none of its
    numbers: the official kernels want 256, the scan of `layers.Mamba2` is fastest at its own 64."""


@dataclass(frozen=True)
class AttentionConfig:
    """Attention, one entry a stage."""

    num_heads: tuple[int, ...] = ()
    rotary_emb_dim: tuple[int, ...] = ()
    """Channels of each head that carry positions."""
    window_size: tuple[int, ...] = ()
    """Positions kept to the left besides the own one; -1 keeps all."""


@dataclass(frozen=True)
class HNetConfig:
    """Sizes of an HNetLM.

    Raises:
        ValueError: entries that do not fit together, named with what came and what was wanted.

    >>> HNetConfig.preset("hnet_1stage_L").stages
    1
    """

    arch_layout: ArchLayout
    d_model: tuple[int, ...]
    """Width of each stage, the main network's last; never falling."""
    d_intermediate: tuple[int, ...] = ()
    """Width of the SwiGLU of each stage; 0 where it has none."""
    vocab_size: int = 256
    ssm_cfg: SSMConfig = field(default_factory=SSMConfig)
    attn_cfg: AttentionConfig = field(default_factory=AttentionConfig)
    tie_embeddings: bool = False
    target_ratio: tuple[float, ...] = ()
    """N of the ratio loss of each stage with a chunker; 6 for one stage, 3 each for more."""
    ratio_loss_weight: float = 0.03
    """alpha of the ratio loss; 0.03 in every experiment of the paper."""
    smoothing_clamp: float = 0.0
    """The smoothing clamps its probabilities to [c, 1 - c]. The official code has 1e-4; 0 leaves
    them alone, as the paper does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch_layout", nested_layout(self.arch_layout))
        for name, kind in (("ssm_cfg", SSMConfig), ("attn_cfg", AttentionConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name} must be an {kind.__name__}, got {type(getattr(self, name)).__name__}"
                )
        levels = len(self.levels())
        for name, fallback in (
            ("d_model", None),
            ("d_intermediate", 0),
            ("target_ratio", 6.0 if levels == 2 else 3.0),
        ):
            wanted = levels - 1 if name == "target_ratio" else levels
            values = one_entry_each(name, getattr(self, name), wanted, fallback)
            object.__setattr__(self, name, values)
        filled = {
            name: one_entry_each(f"attn_cfg.{name}", getattr(self.attn_cfg, name), levels, fallback)
            for name, fallback in (("num_heads", 16), ("rotary_emb_dim", 0), ("window_size", -1))
        }
        object.__setattr__(self, "attn_cfg", AttentionConfig(**filled))
        self._check_values()
        for stage, layouts in enumerate(self.levels()):
            self._check_stage(stage, "".join(layouts))

    def _check_values(self) -> None:
        check_integers("d_model", self.d_model, 1)
        if list(self.d_model) != sorted(self.d_model):
            raise ValueError(f"d_model must never fall, got {list(self.d_model)}")
        check_integer("vocab_size", self.vocab_size, 1)
        check_integers("d_intermediate", self.d_intermediate)
        for part, name in ((self.ssm_cfg, "ssm_cfg"), (self.attn_cfg, "attn_cfg")):
            for key, value in vars(part).items():
                check = check_integers if isinstance(value, tuple) else check_integer
                check(f"{name}.{key}", value)
        require(
            isinstance(self.tie_embeddings, bool),
            "tie_embeddings",
            "true or false",
            self.tie_embeddings,
        )
        for stage, ratio in enumerate(self.target_ratio):
            fits = is_number(ratio) and ratio > 1
            require(fits, f"target_ratio[{stage}]", "a finite number above 1", ratio)
        weight, clamp = self.ratio_loss_weight, self.smoothing_clamp
        fits = is_number(weight) and weight >= 0
        require(fits, "ratio_loss_weight", "a finite number of at least 0", weight)
        fits = is_number(clamp) and 0 <= clamp < 0.5
        require(fits, "smoothing_clamp", "a number in [0, 0.5)", clamp)

    def _check_stage(self, stage: int, letters: str) -> None:
        """What the layers of one stage read; the rest of its entries may be anything."""
        width, ssm, attention = self.d_model[stage], self.ssm_cfg, self.attn_cfg
        if any(map(str.isupper, letters)):
            check_integer(f"d_intermediate[{stage}]", self.d_intermediate[stage], 1)
        if "t" in letters.lower():
            check_attention(
                stage,
                width,
                attention.num_heads[stage],
                attention.rotary_emb_dim[stage],
                attention.window_size[stage],
            )
        if "m" in letters.lower():
            check_mamba(stage, width, ssm.d_state, ssm.d_conv, ssm.expand)

    @property
    def stages(self) -> int:
        """How many stages have a chunker; the main network comes after them."""
        return len(self.d_model) - 1

    def levels(self) -> list[tuple[str, ...]]:
        """The layout strings of each level: (encoder, decoder), ..., (main network,)."""
        levels: list[tuple[str, ...]] = []
        layout = self.arch_layout
        while len(layout) == 3:
            levels.append((layout[0], layout[2]))
            layout = layout[1]
        return [*levels, (layout[0],)]

    @classmethod
    def preset(cls, name: str) -> "HNetConfig":
        """One of `PRESETS`, by name.

        Raises:
            ValueError: no such name.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    @classmethod
    def create_reasonable_config(cls, D: Sequence[int], arch: Sequence[str]) -> "HNetConfig":
        """A configuration from widths and layouts alone, outermost first.

        Each stage's decoder mirrors its encoder, heads have about 64 channels, rotary positions
        cover half of a head, and the outer stages look 1024 positions back.

        >>> HNetConfig.create_reasonable_config(D=[512, 1024], arch=["m4", "T9"]).arch_layout
        ('m4', ('T9',), 'm4')
        """
        for name, values in (("D", D), ("arch", arch)):
            fits = isinstance(values, Sequence) and not isinstance(values, str)
            require(fits, name, "a list with one entry a level", values)
        if len(D) != len(arch) or not D:
            raise ValueError(f"D and arch must have one entry a level, got {D} and {arch}")
        check_integers("D", D, 1)
        for place, text in enumerate(arch):
            require(isinstance(text, str), f"arch[{place}]", 'a layout such as "m4"', text)
        layout: tuple[Any, ...] = nested_layout([arch[-1]])
        for encoder in reversed(arch[:-1]):
            layout = (encoder, layout, _mirrored(encoder))
        heads = tuple(_heads(dim) for dim in D)
        return cls(
            arch_layout=layout,
            d_model=tuple(D),
            d_intermediate=tuple(
                swiglu_width(dim) if any(map(str.isupper, text)) else 0
                for dim, text in zip(D, arch, strict=True)
            ),
            attn_cfg=AttentionConfig(
                num_heads=heads,
                rotary_emb_dim=tuple(d // h // 4 * 2 for d, h in zip(D, heads, strict=True)),
                window_size=(*[1023] * (len(D) - 1), -1),
            ),
        )

    @classmethod
    def from_json(cls, path: str | Path) -> "HNetConfig":
        """Read a JSON file, official ones as they are.

        Raises:
            ValueError: not JSON, an unknown key, or an entry that cannot be; the file is named.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "HNetConfig":
        """The configuration that `to_dict` or an official file describes."""
        parts = {"ssm_cfg": SSMConfig, "attn_cfg": AttentionConfig}
        values: dict[str, Any] = {}
        for name, value in _known(cls, content, "the configuration").items():
            if name in parts:
                value = parts[name](**_known(parts[name], value, name))
            values[name] = value
        missing = {"arch_layout", "d_model"} - values.keys()
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(sorted(missing))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    def to_json(self, path: str | Path, *, official: bool = False) -> None:
        """Write the configuration where `from_json` reads it.

        `official` leaves out what the official format does not know: the target ratios, the
        weight of the ratio loss and the clamp of the smoothing.
        """
        content = self.to_dict()
        if official:
            content = {key: value for key, value in content.items() if key not in _NOT_OFFICIAL}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _known(cls: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(content).__name__}")
    names = {entry.name for entry in dataclasses.fields(cls)}
    unknown = sorted(map(str, content.keys() - names))
    if unknown:
        raise ValueError(f"{where} has unknown entries {unknown}; it knows {sorted(names)}")
    return dict(content)


def _mirrored(text: str) -> str:
    """ "T1m4" -> "m4T1"."""
    return "".join(f"{letter}{count}" for letter, count in reversed(parse_layout(text)))


def _heads(dim: int) -> int:
    """The number of heads nearest to 64 channels each that divides the width."""
    return min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(dim / h - 64))


def _published(layout: ArchLayout, widths: Sequence[int]) -> HNetConfig:
    """Heads, rotary channels, window and SwiGLU widths as all published models have them."""
    swiglu = {1024: 2816, 1536: 4096, 2048: 5504}
    levels = len(widths)
    return HNetConfig(
        arch_layout=layout,
        d_model=tuple(widths),
        d_intermediate=(0, *(swiglu[width] for width in widths[1:])),
        attn_cfg=AttentionConfig(
            num_heads=(16,) * levels,
            rotary_emb_dim=tuple(width // 32 for width in widths),
            window_size=(*[1023] * (levels - 1), -1),
        ),
    )


def _two_stage_xl(main: str) -> HNetConfig:
    return _published(["m4", ["T1m4", [main], "m4T1"], "m4"], [1024, 1536, 2048])


PRESETS: dict[str, HNetConfig] = {
    "hnet_1stage_L": _published(["m4", ["T22"], "m4"], [1024, 1536]),
    "hnet_2stage_L": _published(["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536]),
    "hnet_1stage_XL": _published(["m4", ["T24"], "m4"], [1024, 2048]),
    "hnet_2stage_XL": _two_stage_xl("T27"),
    "hnet_2stage_XL_chinese": _two_stage_xl("T30"),
    "hnet_2stage_XL_code": _two_stage_xl("T28"),
    # For a laptop.
    "hnet_1stage_S": HNetConfig.create_reasonable_config(D=[256, 384], arch=["m2", "T4"]),
    "hnet_2stage_S": HNetConfig.create_reasonable_config(
        D=[256, 256, 384], arch=["m2", "T1m1", "T4"]
    ),
}
