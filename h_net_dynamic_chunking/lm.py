"""HNetLM: the published byte-level language models, built from HNet and layers.

    logits = lm_head(backbone(embeddings(ids)))

`backbone` is an HNet of `Isotropic` stacks, as deep as the configuration says; widths meet by the
shared pad vector and slice of section 2.1.2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking import checkpoints
from h_net_dynamic_chunking.config import PRESETS, HNetConfig
from h_net_dynamic_chunking.config_checks import MAMBA_HEAD_DIM
from h_net_dynamic_chunking.files import whole
from h_net_dynamic_chunking.flops import flops_per_byte
from h_net_dynamic_chunking.h_net import HNet
from h_net_dynamic_chunking.layers import Isotropic, parse_layout
from h_net_dynamic_chunking.layers._checks import check_flag
from h_net_dynamic_chunking.layers.embedding import Embedding
from h_net_dynamic_chunking.layout import Layout, layout_of
from h_net_dynamic_chunking.lm_inference import InferenceCache, LMInference, check_ids
from h_net_dynamic_chunking.lm_input import checked_labels, checked_lens
from h_net_dynamic_chunking.lm_output import HNetLMOutput, StageRecord
from h_net_dynamic_chunking.ops.cross_entropy import IGNORED, summed_cross_entropy
from h_net_dynamic_chunking.ops.packing import accumulation_dtype
from h_net_dynamic_chunking.scaling import (
    INIT_STD,
    init_stacks,
    lr_multipliers,
    parameter_groups,
)
from h_net_dynamic_chunking.sequence_module import call_module, unwrapped


class HNetLM(LMInference):
    """A byte-level language model with the architecture of the published checkpoints.

    Args:
        config: its sizes.
        ratio_loss_weight: in place of the configuration's, if given.
        smoothing_clamp: in place of the configuration's, if given; 0 clamps nothing.
        max_chunks: how many chunks a sequence may have at each stage, outermost first, as in
            `DynamicSequenceChunker`; then no shape depends on what the routers choose. None or
            empty: no limits.
        activation_checkpointing: of every stack of layers; see `Isotropic`.

    `config` keeps what was given, and `save_pretrained` with it.

    Raises:
        ValueError: config is something else, or an option is out of its range.

    >>> model = HNetLM(HNetConfig.create_reasonable_config(D=[64, 128], arch=["m1", "T1"]))
    >>> model(torch.randint(256, (2, 30))).logits.shape
    torch.Size([2, 30, 256])
    """

    backbone: HNet | Isotropic

    def __init__(
        self,
        config: HNetConfig,
        *,
        ratio_loss_weight: float | None = None,
        smoothing_clamp: float | None = None,
        max_chunks: Sequence[int] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        if not isinstance(config, HNetConfig):
            raise ValueError(f"config must be an HNetConfig, got {type(config).__name__}")
        check_flag(activation_checkpointing=activation_checkpointing)
        super().__init__()
        if ratio_loss_weight is not None:
            config = replace(config, ratio_loss_weight=ratio_loss_weight)
        if smoothing_clamp is not None:
            config = replace(config, smoothing_clamp=smoothing_clamp)
        self.config = config
        self.embeddings = Embedding(config.vocab_size, config.d_model[0])
        self.backbone = _build(config, 0)
        self.lm_head = nn.Linear(config.d_model[0], config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        self._limit_chunks(() if max_chunks is None else max_chunks)
        for stack in itertools.chain(*self.stacks):
            stack.activation_checkpointing = activation_checkpointing
        self.init_weights()

    @property
    def stacks(self) -> list[list[Isotropic]]:
        """The layer stacks of each level: encoder and decoder, ..., the main network."""
        stages, main = self._levels()
        levels = [(stage.encoder, stage.decoder) for stage in stages]
        return [[cast(Isotropic, unwrapped(s)) for s in stacks] for stacks in (*levels, (main,))]

    def _levels(self) -> tuple[list[HNet], nn.Module]:
        """The stages from the outside in, and the main network."""
        stages = []
        level = unwrapped(self.backbone)
        while isinstance(level, HNet):
            stages.append(level)
            level = unwrapped(level.network)
        return stages, level

    def _limit_chunks(self, max_chunks: Sequence[int]) -> None:
        stages, _ = self._levels()
        if not isinstance(max_chunks, Sequence) or (
            len(max_chunks) not in (0, len(stages))
            or any(type(n) is not int or n < 1 for n in max_chunks)
        ):
            raise ValueError(
                f"max_chunks must have one integer of at least 1 for each of {len(stages)} "
                f"stages, got {max_chunks!r}"
            )
        for stage, limit in zip(stages, max_chunks, strict=False):
            stage.chunker.max_chunks = limit

    def compile_layers(self, **options: Any) -> None:
        """torch.compile each layer by itself, with `options`; names of parameters stay.

        Layers of one kind and width share what is compiled, which serves sequences of any length.
        Between them all runs as it is, the one host read of a stage among it.
        """
        for stack in itertools.chain(*self.stacks):
            for layer in stack.layers:
                layer.compile(**{"dynamic": True, **options})

    @torch.no_grad()
    def init_weights(self, std: float = INIT_STD) -> None:
        """Initialise as the official code does; chunkers keep the start that they chose.

        Linear layers are N(0, std); those that write to the residual stream shrink by the root of
        the additions that the stream has met on the way in.
        """
        nn.init.normal_(self.embeddings.weight)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=std)
        init_stacks(self.stacks, std)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        boundary_masks: Any = (),
        inference_params: InferenceCache | None = None,
    ) -> HNetLMOutput:
        """Predict the byte after each.

        Args:
            input_ids: int (batch, length); or packed (total,) with `cu_seqlens`; or jagged.
            labels: int, like input_ids: the byte after each, -100 where there is none to predict.
                What stands behind the real positions of a row does not count.
            mask: bool (batch, length), True at real positions, which stand on the left.
            lens: int (batch,): the same, as lengths.
            cu_seqlens: int (batch + 1,): cumulative lengths of packed ids.
            boundary_masks: as in `HNet`.
            inference_params: a cache of `allocate_inference_cache`: the ids go on where it stands,
                and it remembers them. A whole prompt, a piece of one, or nothing new in some rows
                (lens 0). There are no labels and no losses then.

        Raises:
            ValueError: shapes, lengths or ids that cannot be, or a cache that does not fit, which
                is as it was then. On a GPU, where reading ids would stop the host, ids out of
                range end in an error of the device.
        """
        check_ids("input_ids", input_ids, self.config.vocab_size)
        lens = checked_lens(input_ids, mask, lens, cu_seqlens)
        if inference_params is not None:
            if labels is not None:
                raise ValueError("labels must be None with inference_params, which have no losses")
            return self.extend(input_ids, inference_params, lens, cu_seqlens, boundary_masks)
        x = self.embeddings(input_ids.long())
        # Not by the class of the backbone, which torch.compile and others hide.
        if self.config.stages:
            result = self.backbone(x, lens, cu_seqlens=cu_seqlens, boundary_masks=boundary_masks)
            hidden, weighted, records = result.output, result.loss, result.intermediates
            layout = records[0].layout
        else:
            if len(boundary_masks):
                raise ValueError("boundary_masks must be empty: this model has no chunker")
            layout = layout_of(x, lens, cu_seqlens)
            hidden = _run_stack(self.backbone, x, layout)
            weighted, records = x.new_zeros((), dtype=accumulation_dtype(x.dtype)), ()
        logits = self.lm_head(hidden)
        stages = tuple(StageRecord(record) for record in records)
        ratio_loss = torch.stack([s.ratio_loss for s in stages]).sum() if stages else weighted
        if labels is None:
            return HNetLMOutput(logits, None, None, ratio_loss, stages)
        loss_sum, count = self._cross_entropy(logits, labels, layout)
        mean = loss_sum / count
        return HNetLMOutput(logits, mean + weighted, loss_sum, ratio_loss, stages, mean)

    @classmethod
    def from_official(
        cls,
        config_json: HNetConfig | str | Path,
        weights: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "HNetLM":
        """A model with the weights of an official checkpoint.

        Args:
            config_json: the official configuration file, or what it says.
            weights: the official .pt file; nothing in it is executed.
            device: where the model goes.
            dtype: of all weights; None keeps each as it is stored.
            **options: of the constructor.

        Raises:
            ValueError: either file cannot be read, or a tensor is missing, extra, of another shape
                or not of floats; see `checkpoints.read_weights` and `checkpoints.check_matches`.
                Or dtype is none of floats.
        """
        _check_dtype(dtype)
        if isinstance(config_json, HNetConfig):
            config = config_json
        else:
            config = HNetConfig.from_json(config_json)
        return cls._with_official_weights(config, Path(weights), device, dtype, options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "HNetLM":
        """A model that `save_pretrained` wrote, or one of the Hugging Face hub.

        Args:
            name_or_path: a directory, or a name on the hub such as "cartesia-ai/hnet_1stage_L".
                An official checkpoint NAME.pt without a configuration takes the preset NAME.
            device: where the model goes.
            dtype: of all weights; None keeps each as it is stored.
            **options: of the constructor.

        Raises:
            ValueError: there is no model there, or it does not fit its configuration; or dtype is
                none of floats.
        """
        _check_dtype(dtype)
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = checkpoints.fetch_from_hub(str(name_or_path))
        name = Path(name_or_path).name
        if (folder / "config.json").is_file():
            config = HNetConfig.from_json(folder / "config.json")
            weights = folder / "model.safetensors"
            state = checkpoints.read_safetensors(weights)
            return cls._with_state(config, state, str(weights), device, dtype, options)
        if name in PRESETS and (folder / f"{name}.pt").is_file():
            weights = folder / f"{name}.pt"
            return cls._with_official_weights(PRESETS[name], weights, device, dtype, options)
        raise ValueError(f"name_or_path: {folder} holds no config.json")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which `from_pretrained` reads.

        Raises:
            ValueError: the weights are not those that the configuration describes, so that the
                files could not be read again.
            OSError: the files cannot be written. What was there before is there still.
        """
        state, folder = self._state_to_save(), Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with (
            whole(folder / "config.json") as config,
            whole(folder / "model.safetensors") as weights,
        ):
            self.config.to_json(config)
            checkpoints.write_safetensors(state, weights)

    def save_official(self, config_json: str | Path, weights: str | Path) -> None:
        """Write the configuration and the state dict as the official code reads them.

        Target ratios, the weight of the ratio loss and the clamp of the smoothing have no place in
        the official format and are left out.

        Raises:
            ValueError, OSError: as `save_pretrained`.
        """
        official = checkpoints.to_official(self._state_to_save(), self.config.stages)
        with whole(Path(config_json)) as config, whole(Path(weights)) as part:
            self.config.to_json(config, official=True)
            checkpoints.write_weights(official, part)

    def _state_to_save(self) -> dict[str, Tensor]:
        """The state dict, if a model of this configuration can load it; else a ValueError."""
        # torch.compile of a part puts its own name into the keys.
        state = {key.replace("_orig_mod.", ""): value for key, value in self.state_dict().items()}
        where = "the model"
        checkpoints.check_matches(state, self._on_meta(self.config, {}).state_dict(), where)
        if self.config.tie_embeddings:
            checkpoints.check_tied(state, where)
        return state

    @classmethod
    def _with_official_weights(
        cls,
        config: HNetConfig,
        weights: Path,
        device: torch.device | str,
        dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> "HNetLM":
        official = checkpoints.read_weights(weights)
        expected = checkpoints.to_official(
            cls._on_meta(config, options).state_dict(), config.stages
        )
        # Under the official names, which are the ones that the file's owner knows.
        checkpoints.check_matches(official, expected, str(weights))
        # Two tensors of a file may be one in memory, which an optimizer would move twice.
        apart = checkpoints.on_own_memory(official)
        state = checkpoints.from_official(apart, config.stages)
        return cls._with_state(config, state, str(weights), device, dtype, options)

    @classmethod
    def _with_state(
        cls,
        config: HNetConfig,
        state: dict[str, Tensor],
        where: str,
        device: torch.device | str,
        dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> "HNetLM":
        """A model that owns the tensors of `state`: nothing is allocated beside them."""
        model = cls._on_meta(config, options)
        checkpoints.check_matches(state, model.state_dict(), where)
        if config.tie_embeddings:
            checkpoints.check_tied(state, where)
        model.load_state_dict(
            {key: value.to(device, dtype) for key, value in state.items()}, assign=True
        )
        if config.tie_embeddings:
            model.lm_head.weight = model.embeddings.weight
        return model

    @classmethod
    def _on_meta(cls, config: HNetConfig, options: dict[str, Any]) -> "HNetLM":
        with torch.device("meta"):
            return cls(config, **options)

    def flops_per_byte(
        self, seq_len: int = 8192, positions_per_chunk: Sequence[float] | None = None
    ) -> float:
        """Forward FLOPs for each byte; see `flops.flops_per_byte`."""
        return flops_per_byte(self.config, seq_len, positions_per_chunk)

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def lr_multipliers(self) -> list[float]:
        """Factors on the learning rate of each level, main network last; eq. (11)."""
        return lr_multipliers(self.config.d_model, self.config.target_ratio)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer; see `scaling.parameter_groups`."""
        return parameter_groups(self.parameters_by_level(), self.lr_multipliers(), weight_decay)

    def parameters_by_level(self) -> list[list[nn.Parameter]]:
        """The parameters of each level; the vector that widens the way in belongs inside."""
        levels: list[list[nn.Parameter]] = [list(self.embeddings.parameters())]
        if not self.config.tie_embeddings:
            levels[0] += self.lm_head.parameters()
        stages, main = self._levels()
        for stage in stages:
            for part in (stage.encoder, stage.chunker, stage.decoder):
                levels[-1] += part.parameters()
            levels.append(list(stage.width_in.parameters()))
        levels[-1] += main.parameters()
        return levels

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """The summed cross entropy, and how many labels there were (at least 1)."""
        flat = checked_labels(labels, logits, layout, self.config.vocab_size).flatten()
        logits = logits.values() if logits.is_nested else logits
        loss = summed_cross_entropy(logits.flatten(0, -2), flat)
        return loss, (flat != IGNORED).sum().clamp(min=1)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")


def _run_stack(stack: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """A stack alone, on any layout."""
    if layout.jagged:
        return layout.unpack(stack(x.values(), layout.cu_seqlens, has_tail=False))
    return call_module("backbone", stack, x, layout)[0]


def _build(config: HNetConfig, level: int) -> HNet | Isotropic:
    """The stage at `level` and all inside it."""
    stacks = [_stack(config, level, layout) for layout in config.levels()[level]]
    if level == config.stages:
        return stacks[0]
    encoder, decoder = stacks
    return HNet(
        encoder,
        _build(config, level + 1),
        decoder,
        dim=config.d_model[level],
        dim_inner=config.d_model[level + 1],
        width_change="pad",
        target_avg_token_length=config.target_ratio[level],
        ratio_loss_weight=config.ratio_loss_weight,
        smoothing_clamp=config.smoothing_clamp or None,
    )


def _stack(config: HNetConfig, level: int, layout: str) -> Isotropic:
    attention, ssm = config.attn_cfg, config.ssm_cfg
    letters = {letter.lower() for letter, _ in parse_layout(layout)}
    return Isotropic(
        layout,
        config.d_model[level],
        ssm={
            "d_state": ssm.d_state,
            "d_conv": ssm.d_conv,
            "expand": ssm.expand,
            "head_dim": MAMBA_HEAD_DIM,
        }
        if "m" in letters
        else None,
        attention={
            "num_heads": attention.num_heads[level],
            "rotary_dim": attention.rotary_emb_dim[level],
            "window_size": attention.window_size[level],
        }
        if "t" in letters
        else None,
        d_intermediate=config.d_intermediate[level] or None,
    )
