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

from h_net_dynamic_chunking.layers.isotropic import parse_layout

# How a layout nests: one string in a list, or encoder, inner layout, decoder.
ArchLayout = Sequence[Any]


@dataclass(frozen=True)
class SSMConfig:
    """Mamba-2, shared by all stages."""

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    chunk_size: int = 256


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch_layout", _as_lists(self.arch_layout))
        levels = len(self.levels())
        for name, fallback in (
            ("d_model", None),
            ("d_intermediate", 0),
            ("target_ratio", 6.0 if levels == 2 else 3.0),
        ):
            wanted = levels - 1 if name == "target_ratio" else levels
            object.__setattr__(self, name, _filled(name, getattr(self, name), wanted, fallback))
        filled = {
            name: _filled(f"attn_cfg.{name}", getattr(self.attn_cfg, name), levels, fallback)
            for name, fallback in (("num_heads", 16), ("rotary_emb_dim", 0), ("window_size", -1))
        }
        object.__setattr__(self, "attn_cfg", AttentionConfig(**filled))
        self._check_values()

    def _check_values(self) -> None:
        if min(self.d_model) < 1 or list(self.d_model) != sorted(self.d_model):
            raise ValueError(f"d_model must be positive and never fall, got {list(self.d_model)}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if any(ratio <= 1 for ratio in self.target_ratio):
            raise ValueError(f"target_ratio must be above 1, got {list(self.target_ratio)}")
        for stage, (letters, width) in enumerate(
            zip(map("".join, self.levels()), self.d_intermediate, strict=True)
        ):
            if any(letter.isupper() for letter in letters) and width < 1:
                raise ValueError(
                    f"d_intermediate must be positive at stage {stage}, whose layout "
                    f"has layers with an MLP, got {width}"
                )

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
        # A copy, because the lists in it could be changed.
        return cls.from_dict(PRESETS[name].to_dict())

    @classmethod
    def create_reasonable_config(cls, D: Sequence[int], arch: Sequence[str]) -> "HNetConfig":
        """A configuration from widths and layouts alone, outermost first.

        Each stage's decoder mirrors its encoder, heads have about 64 channels, rotary positions
        cover half of a head, and the outer stages look 1024 positions back.

        >>> HNetConfig.create_reasonable_config(D=[512, 1024], arch=["m4", "T9"]).arch_layout
        ['m4', ['T9'], 'm4']
        """
        if len(D) != len(arch) or not D:
            raise ValueError(f"D and arch must have one entry a level, got {D} and {arch}")
        layout: list[Any] = [arch[-1]]
        for encoder in reversed(arch[:-1]):
            layout = [encoder, layout, _mirrored(encoder)]
        heads = tuple(_heads(dim) for dim in D)
        return cls(
            arch_layout=layout,
            d_model=tuple(D),
            d_intermediate=tuple(
                _swiglu_width(dim) if any(map(str.isupper, text)) else 0
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
            ValueError: not JSON, an unknown key, or entries that do not fit together.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
        return cls.from_dict(content)

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

        `official` leaves out what the official format does not know: the target ratios.
        """
        content = self.to_dict()
        if official:
            del content["target_ratio"]
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_lists(layout: ArchLayout) -> list[Any]:
    """A checked copy of a layout."""
    if isinstance(layout, str) or not isinstance(layout, Sequence) or len(layout) not in (1, 3):
        raise ValueError(
            f'arch_layout must be ["T9"], or [encoder, inner layout, decoder], got {layout!r}'
        )
    strings = (layout[0], layout[-1])
    if not all(isinstance(text, str) for text in strings):
        raise ValueError(f"arch_layout must name its stacks by strings, got {layout!r}")
    for text in strings:
        parse_layout(text)
    return [layout[0]] if len(layout) == 1 else [layout[0], _as_lists(layout[1]), layout[2]]


def _filled(name: str, values: Any, wanted: int, fallback: Any) -> tuple[Any, ...]:
    """`values` as a tuple of `wanted` entries; the fallback everywhere if there are none."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list, got {values!r}")
    if not values and fallback is not None:
        return (fallback,) * wanted
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{name} must hold numbers, got {list(values)}")
    if len(values) != wanted:
        raise ValueError(
            f"{name} must have {wanted} entries for this arch_layout, got {list(values)}"
        )
    return tuple(values)


def _known(cls: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(content).__name__}")
    names = {entry.name for entry in dataclasses.fields(cls)}
    unknown = sorted(content.keys() - names)
    if unknown:
        raise ValueError(f"{where} has unknown entries {unknown}; it knows {sorted(names)}")
    return dict(content)


def _mirrored(text: str) -> str:
    """ "T1m4" -> "m4T1"."""
    return "".join(f"{letter}{count}" for letter, count in reversed(parse_layout(text)))


def _heads(dim: int) -> int:
    """The number of heads nearest to 64 channels each that divides the width."""
    return min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(dim / h - 64))


def _swiglu_width(dim: int) -> int:
    return -(-8 * dim // 3 // 128) * 128


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
