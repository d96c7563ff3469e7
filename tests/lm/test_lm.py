"""HNetLM: layouts agree, causality, losses, parameter groups, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from h_net_dynamic_chunking import HNetConfig, HNetLM
from h_net_dynamic_chunking.h_net import HNet
from h_net_dynamic_chunking.layers import Mamba2
from h_net_dynamic_chunking.ops.backend import chosen_backend, use_backend
from tests.support import assert_close, cumulative, generator

LENS = [1, 40, 2, 0, 70]


def make(*arch: str, widths: tuple[int, ...] = (32, 32, 64, 64), seed: int = 0) -> HNetLM:
    """A float64 model, its windows shorter than the sequences, whose routers cut at random."""
    torch.manual_seed(seed)
    content = HNetConfig.create_reasonable_config(D=widths[: len(arch)], arch=arch).to_dict()
    content["attn_cfg"]["window_size"] = [7] * (len(arch) - 1) + [-1]
    content["ssm_cfg"] = {"d_state": 8}
    model = HNetLM(HNetConfig.from_dict(content)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=generator(3))


ARCHITECTURES = [("T2",), ("m1", "T1"), ("m1", "T1m1", "M1"), ("T1", "m1", "t1m1", "T1")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padded_packed_jagged_and_alone_agree(arch: tuple[str, ...]) -> None:
    """Logits, losses and all gradients; windows and chunk edges are crossed."""
    model, ids, cu_seqlens = make(*arch), random_ids(sum(LENS)), cumulative(LENS)
    labels = random_ids(sum(LENS))
    real = torch.arange(max(LENS)) < torch.tensor(LENS)[:, None]
    padded, padded_labels = torch.zeros_like(real, dtype=torch.int64), torch.full(real.shape, 7)
    padded[real], padded_labels[real] = ids, labels

    def gradients(loss: Tensor | None) -> list[Tensor]:
        assert loss is not None
        return list(torch.autograd.grad(loss, list(model.parameters())))

    packed = model(ids, labels, cu_seqlens=cu_seqlens)
    want = gradients(packed.loss)
    jagged = [
        torch.nested.nested_tensor_from_jagged(values, cu_seqlens) for values in (ids, labels)
    ]
    results = {
        "lens": model(padded, padded_labels, lens=torch.tensor(LENS)),
        "mask": model(padded, padded_labels, mask=real),
        "jagged": model(*jagged),
    }
    for name, result in results.items():
        logits = result.logits.values() if name == "jagged" else result.logits[real]
        assert_close(name, logits, packed.logits)
        for g, w in zip(gradients(result.loss), want, strict=True):
            assert_close(f"{name} gradient", g, w)
    alone = [model(row[None]).logits[0] for row in ids.split(LENS) if len(row)]
    assert_close("alone", torch.cat(alone), packed.logits)


def test_long_sequences_beside_short_ones() -> None:
    """Logits and gradients at a length that crosses every window and chunk edge many times."""
    lens = [8193, 1, 2]
    model, ids = make("m1", "T1"), random_ids(sum(lens))
    real = torch.arange(max(lens)) < torch.tensor(lens)[:, None]
    padded = torch.zeros_like(real, dtype=torch.int64)
    padded[real] = ids
    weights = torch.randn(sum(lens), 256, generator=generator(5), dtype=torch.float64)

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logits * weights).sum(), list(model.parameters()))

    alone = torch.cat([model(row[None]).logits[0] for row in ids.split(lens)])
    wanted = gradients(alone)
    for name, logits in (
        ("packed", model(ids, cu_seqlens=cumulative(lens)).logits),
        ("padded", model(padded, lens=torch.tensor(lens)).logits[real]),
    ):
        assert_close(f"{name} logits", logits, alone)
        for got, want in zip(gradients(logits), wanted, strict=True):
            assert_close(f"{name} gradient", got, want)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_causal_by_perturbation(arch: tuple[str, ...]) -> None:
    model, ids = make(*arch), random_ids(1, 60)
    with torch.no_grad():
        want = model(ids).logits
        for t in (1, 30, 59):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 7) % 256
            assert_close("logits", model(changed).logits[:, :t], want[:, :t], 1e-10)


def test_losses() -> None:
    model, ids = make("m1", "m1", "T1"), random_ids(2, 30)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    out = model(ids, labels)
    log_probs = out.logits[:, :-1].log_softmax(-1)
    nats = -log_probs.gather(-1, labels[:, :-1, None])
    assert_close("sum", out.loss_sum, nats.sum())
    assert_close("mean", out.cross_entropy, nats.mean())
    assert_close("loss", out.loss, nats.mean() + 0.03 * out.ratio_loss)
    assert_close("ratio", out.ratio_loss, torch.stack([s.ratio_loss for s in out.stages]).sum())
    assert [float(s.bytes_per_chunk) for s in out.stages] == pytest.approx(
        [
            60 / float(out.stages[0].boundary_mask.sum()),
            60 / float(out.stages[1].boundary_mask.sum()),
        ]
    )


def test_initialisation_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = HNetLM(
        HNetConfig.create_reasonable_config(D=[256, 256, 512], arch=["m1", "T1m1", "T2"])
    )
    assert isinstance(model.backbone, HNet)
    inner = model.backbone.network
    assert isinstance(inner, HNet)
    # Additions met on the way in: 2, then 2 * 3 more, then 4 more.
    for weight, std in (
        (model.embeddings.weight, 1.0),
        (model.lm_head.weight, 0.02),
        (model.backbone.encoder.layers[0].mixer.in_proj.weight, 0.02),
        (model.backbone.encoder.layers[0].mixer.out_proj.weight, 0.02 / 2**0.5),
        (inner.decoder.layers[0].mixer.out_proj.weight, 0.02 / 8**0.5),
        (inner.network.layers[1].mlp.fc2.weight, 0.02 / 12**0.5),
        (inner.network.layers[1].mlp.fc1.weight, 0.02),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert not model.backbone.chunker.residual_proj.weight.any()
    assert not inner.width_in.vector.any()
    assert torch.equal(inner.chunker.to_queries_keys.weight[:256], torch.eye(256))


def test_parameter_groups() -> None:
    """Every parameter once, at the rate of its level; what has one dimension does not decay."""
    with torch.device("meta"):
        model = HNetLM(HNetConfig.preset("hnet_2stage_XL"))
    target = model.config.target_ratio
    assert target == (3.0, 3.0)
    assert model.lr_multipliers() == pytest.approx([3.033, 1.430, 0.715], abs=1e-3)
    groups = model.parameter_groups(weight_decay=0.1)
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    decaying = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    for name, _ in model.named_parameters():
        undecayed = name.endswith((".bias", "A_log", ".D", "dt_bias", "width_in.vector"))
        assert (name in decaying) != (undecayed or "norm" in name.rsplit(".", 2)[-2]), name
    rates = {names[id(p)]: g["lr_multiplier"] for g in groups for p in g["params"]}
    assert rates["lm_head.weight"] == rates["backbone.chunker.to_queries_keys.weight"]
    assert rates["backbone.width_in.vector"] == rates["backbone.network.encoder.rmsnorm.weight"]
    assert rates["backbone.network.width_in.vector"] == model.lr_multipliers()[2]
    torch.optim.AdamW(groups, lr=1e-3)
    for bad in (-1, math.nan, math.inf, None, "x", True):
        wanted = f"weight_decay must be a finite number of at least 0, got {bad!r}"
        with pytest.raises(ValueError, match=wanted):
            model.parameter_groups(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 4)}, "input_ids must be integers"),
        ({"input_ids": torch.full((1, 4), 256)}, r"input_ids must be in 0 \.\. 255, got 256"),
        ({"input_ids": torch.full((1, 4), -1)}, "input_ids must be in"),
        ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels must have the shape"),
        ({"mask": torch.ones(1, 4).bool(), "lens": torch.tensor([4])}, "exclude each other"),
        ({"mask": torch.tensor([[False, True, True, True]])}, "mask must be True on the left"),
        ({"mask": torch.ones(1, 4)}, "mask must be bool"),
        ({"mask": torch.ones(1, 3).bool()}, "mask must be bool of the shape of input_ids"),
        ({"labels": torch.full((1, 4), 300)}, r"labels must be in 0 \.\. 255, got 300"),
        ({"labels": torch.zeros(1, 4)}, "labels must be integers"),
        ({"input_ids": [[1]]}, "input_ids must be a tensor"),
        ({"lens": torch.tensor([5])}, "lens must be in"),
        (
            {"cu_seqlens": torch.tensor([0, 4])},
            r"input_ids must have shape .*, got \(1, 4\) with cu_seqlens",
        ),
        ({"input_ids": torch.zeros(4).long()}, r"input_ids must have shape .*, got \(4,\)$"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.complex64)}, "input_ids must be integers"),
        ({"mask": [[True] * 4]}, "mask must be a tensor, got list"),
        ({"input_ids": [[1]], "mask": torch.ones(1, 1).bool()}, "input_ids must be a tensor"),
        ({"labels": torch.full((1, 4), -1), "lens": torch.tensor([3])}, "labels must be in"),
        (
            {"input_ids": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens must rise from 0 to 4, the rows of tokens, got .0, 3.",
        ),
        (
            {"mask": torch.ones(1, 4).bool(), "cu_seqlens": torch.tensor([0, 4])},
            "mask and cu_seqlens exclude each other",
        ),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    model = make("m1", "T1")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.zeros(1, 4, dtype=torch.int64), **arguments})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_bytes_of_other_integers(dtype: torch.dtype) -> None:
    model, ids = make("m1", "T1"), random_ids(1, 9)
    want, got = model(ids, ids), model(ids.to(dtype), ids.to(dtype))
    assert torch.equal(got.logits, want.logits)
    assert got.loss == want.loss


def test_labels_of_pads_may_be_anything() -> None:
    model, ids, lens = make("m1", "T1"), random_ids(2, 9), torch.tensor([9, 4])
    labels = ids.clone()
    labels[1, 4:] = 999
    assert model(ids, labels, lens=lens).loss == model(ids, ids, lens=lens).loss


def test_without_a_chunker() -> None:
    model, ids = make("T1"), random_ids(1, 9)
    assert model(ids).stages == ()
    with pytest.raises(ValueError, match="boundary_masks must be empty"):
        model(ids, boundary_masks=[None])
    with pytest.raises(ValueError, match="lens must be in"):
        model(ids, lens=torch.tensor([10]))


def test_the_configuration_reaches_the_modules() -> None:
    config = HNetConfig.from_dict(
        {
            "arch_layout": ["m1", ["T1m1", ["T1"], "m1T1"], "t1"],
            "d_model": [32, 64, 64],
            "d_intermediate": [0, 200, 300],
            "ssm_cfg": {"d_state": 8, "d_conv": 3, "expand": 4},
            "attn_cfg": {
                "num_heads": [2, 4, 8],
                "rotary_emb_dim": [8, 4, 2],
                "window_size": [5, 6, -1],
            },
            "target_ratio": [2.5, 4.5],
        }
    )
    model = HNetLM(config, smoothing_clamp=1e-4, ratio_loss_weight=0.5)
    outer = model.backbone
    assert isinstance(outer, HNet)
    inner = outer.network
    assert isinstance(inner, HNet)
    for stage, ratio in ((outer, 2.5), (inner, 4.5)):
        chunker = stage.chunker
        assert chunker.target_avg_token_length == ratio
        assert (chunker.smoothing_clamp, chunker.ratio_loss_weight) == (1e-4, 0.5)
    mamba = outer.encoder.layers[0].mixer
    assert mamba.chunk_size == Mamba2(64).chunk_size  # not the configuration's, which is 256
    assert (mamba.d_state, mamba.d_conv, mamba.d_inner) == (8, 3, 128)
    for layer, heads, rotary, window in (
        (outer.decoder.layers[0], 2, 8, 5),
        (inner.encoder.layers[0], 4, 4, 6),
        (inner.network.layers[0], 8, 2, -1),
    ):
        mixer = layer.mixer
        assert (mixer.num_heads, mixer.rotary_dim, mixer.window_size) == (heads, rotary, window)
    assert inner.network.layers[0].mlp.fc2.in_features == 384


class DistributedDataParallel(torch.nn.Module):
    """Stands for torch's own, which needs a process group; it is known by its name."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WRAPPERS = {
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "data parallel": DistributedDataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", ["whole", "network", "stack"])
def test_wrapped_parts_change_nothing(wrapper: str, place: str) -> None:
    """Losses, gradients and parameter groups, though the wrapper hides the class of the part."""
    plain, model = make("m1", "T1", "m1"), make("m1", "T1", "m1")
    wrap = WRAPPERS[wrapper]
    assert isinstance(model.backbone, HNet)
    if place == "whole":
        model.backbone = wrap(model.backbone)  # type: ignore[assignment]
    elif place == "network":
        model.backbone.network = wrap(model.backbone.network)
    else:
        model.backbone.encoder = wrap(model.backbone.encoder)
    ids, lens = random_ids(3, 20), torch.tensor([20, 1, 7])

    def run(model: HNetLM) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = model(ids, ids, lens=lens)
        assert out.loss is not None
        assert len(out.stages) == 2
        return out.loss, out.ratio_loss, list(torch.autograd.grad(out.loss, model.parameters()))

    # Inside its wrapper, but without the seconds of compiling.
    with torch.compiler.set_stance("force_eager"):
        loss, ratio, gradients = run(model)
    want, want_ratio, want_gradients = run(plain)
    assert_close("loss", loss, want)
    assert_close("ratio loss", ratio, want_ratio)
    for got, wanted in zip(gradients, want_gradients, strict=True):
        assert_close("gradient", got, wanted)
    sizes = [[len(g["params"]) for g in m.parameter_groups(0.1)] for m in (model, plain)]
    assert sizes[0] == sizes[1]
    assert [len(stacks) for stacks in model.stacks] == [2, 2, 1]


def test_activation_checkpointing_changes_no_number() -> None:
    """Bitwise; and nothing but the inputs of the layers is kept."""
    model, ids, labels = make("m1", "T2", "t1m1"), random_ids(2, 40), random_ids(2, 40)
    outcomes, kept = [], []
    for checkpointing in (False, True):
        for stacks in model.stacks:
            for stack in stacks:
                stack.activation_checkpointing = checkpointing
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels).loss
        assert loss is not None
        outcomes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        kept.append(sum(sizes))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < 0.5 * kept[0]


def test_activation_checkpointing_keeps_the_backend() -> None:
    """The recomputation follows the choice of the forward pass, outside of whose block it runs."""
    config = HNetConfig.create_reasonable_config(D=[32], arch=["T1"])
    model = HNetLM(config, activation_checkpointing=True)
    assert all(stack.activation_checkpointing for stacks in model.stacks for stack in stacks)
    seen: list[str] = []
    block = model.stacks[0][0].layers[0]
    block.register_forward_pre_hook(lambda *_: seen.append(chosen_backend()))
    ids = random_ids(1, 9)
    with use_backend("torch"):
        loss = model(ids, ids).loss
    assert loss is not None
    loss.backward()
    assert seen == ["torch", "torch"]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo asks each tensor
def test_compiled_layers_serve_all_lengths() -> None:
    """Names stay; what is compiled at the first lengths serves all layers and other lengths."""
    model, plain = make("T3", "T3"), make("T3", "T3")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_layers(backend=counter)
    assert model.state_dict().keys() == plain.state_dict().keys()
    counts = []
    for length in (20, 33, 64):
        ids = random_ids(2, length)
        assert_close("loss", *(m(ids, ids).loss for m in (model, plain)))
        counts.append(counter.frame_count)
    # For each width the first layer and the others, and torch may begin anew to trace floats.
    assert 0 < counts[0] == counts[1] == counts[2] <= 8


@pytest.mark.parametrize("max_chunks", [[3], [3, 4, 5], [3, 0], [3, 4.0], 5, 0])
def test_limits_on_chunks_are_checked(max_chunks: Any) -> None:
    config = HNetConfig.create_reasonable_config(D=[32, 32, 64], arch=["m1", "m1", "T1"])
    assert HNetLM(config, max_chunks=[7, 3]).backbone.network.chunker.max_chunks == 3
    with pytest.raises(ValueError, match="max_chunks must have one integer"):
        HNetLM(config, max_chunks=max_chunks)


def test_checkpointing_is_a_flag() -> None:
    config = HNetConfig.create_reasonable_config(D=[32, 64], arch=["m1", "T1"])
    with pytest.raises(ValueError, match="activation_checkpointing must be True or False, got 2"):
        HNetLM(config, activation_checkpointing=2)  # type: ignore[arg-type]
