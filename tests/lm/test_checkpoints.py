"""Checkpoints in and out: exact both ways, faults named, nothing executed, nothing lost."""

import contextlib
import os
import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from h_net_dynamic_chunking import DynamicSequenceChunker, HNetConfig, HNetLM
from h_net_dynamic_chunking.checkpoints import from_official, read_weights, to_official

CONFIG = HNetConfig.create_reasonable_config(D=[32, 32, 64], arch=["m1", "T1m1", "T1"])


@pytest.fixture
def official(tmp_path: Path) -> tuple[HNetLM, Path, Path]:
    """A model and its two official files."""
    torch.manual_seed(0)
    model = HNetLM(CONFIG).bfloat16()
    model.backbone.chunker.residual_proj.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_official(tmp_path / "model.json", tmp_path / "model.pt")
    return model, tmp_path / "model.json", tmp_path / "model.pt"


def same_state(a: HNetLM, b: HNetLM) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


def test_official_round_trip(official: tuple[HNetLM, Path, Path]) -> None:
    model, config, weights = official
    assert same_state(HNetLM.from_official(config, weights), model)
    keys = read_weights(weights)
    assert "backbone.main_network.main_network.main_network.layers.0.mixer.Wqkv.weight" in keys
    assert "backbone.main_network.routing_module.q_proj_layer.weight" in keys
    assert "backbone.main_network.main_network.pad_dimension" in keys
    assert "backbone.main_network.pad_dimension" not in keys  # those widths are equal


def test_queries_and_keys_change_names() -> None:
    """The official q_proj acts on the position before: it makes our keys, the second half."""
    state = HNetLM(CONFIG).state_dict()
    state["backbone.chunker.to_queries_keys.weight"] = torch.arange(64.0)[:, None].expand(64, 32)
    official = to_official(state, CONFIG.stages)
    assert official["backbone.routing_module.q_proj_layer.weight"][0, 0] == 32
    back = from_official(official, CONFIG.stages)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_save_pretrained_round_trip(official: tuple[HNetLM, Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = official[0]
    model.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert same_state(HNetLM.from_pretrained(tmp_path / "saved"), model)
    wide = HNetLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_saved_model_remembers_its_options(tmp_path: Path) -> None:
    """Weight of the ratio loss and clamp of the smoothing; both can be given anew."""
    pytest.importorskip("safetensors")
    HNetLM(CONFIG, ratio_loss_weight=0.5, smoothing_clamp=1e-4).save_pretrained(tmp_path)

    def of_chunkers(model: HNetLM) -> set[tuple[float, float | None]]:
        chunkers = [m for m in model.modules() if isinstance(m, DynamicSequenceChunker)]
        assert len(chunkers) == 2
        return {(chunker.ratio_loss_weight, chunker.smoothing_clamp) for chunker in chunkers}

    assert of_chunkers(HNetLM.from_pretrained(tmp_path)) == {(0.5, 1e-4)}
    other = HNetLM.from_pretrained(tmp_path, ratio_loss_weight=0.0, smoothing_clamp=0.0)
    assert of_chunkers(other) == {(0.0, None)}
    other.save_pretrained(tmp_path)
    assert of_chunkers(HNetLM.from_pretrained(tmp_path)) == {(0.0, None)}


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = HNetConfig(["T1"], (32,), (64,), attn_cfg=CONFIG.attn_cfg.__class__((2,), (8,), (-1,)))
    tied = HNetLM(HNetConfig.from_dict({**config.to_dict(), "tie_embeddings": True}))
    tied.save_pretrained(tmp_path)
    loaded = HNetLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embeddings.weight
    assert loaded.num_parameters() == tied.num_parameters()


def test_saved_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "any").touch()
    HNetLM(CONFIG).save_pretrained(tmp_path / "saved")
    wanted = (tmp_path / "any").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "saved").iterdir()} == {wanted}


def test_odd_memory_is_saved_as_any_other(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = HNetLM(CONFIG)
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
    model.embeddings.weight.data = model.embeddings.weight.data[:1].expand(256, -1)
    model.save_pretrained(tmp_path)
    assert same_state(HNetLM.from_pretrained(tmp_path), model)


def test_a_compiled_part_leaves_no_trace_in_the_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    plain, model = HNetLM(CONFIG), HNetLM(CONFIG)
    model.load_state_dict(plain.state_dict())
    model.backbone.network = torch.compile(model.backbone.network)
    model.save_pretrained(tmp_path)
    assert same_state(HNetLM.from_pretrained(tmp_path), plain)
    model.save_official(tmp_path / "model.json", tmp_path / "model.pt")
    assert same_state(HNetLM.from_official(tmp_path / "model.json", tmp_path / "model.pt"), plain)


def broken(part: str) -> HNetLM:
    """A model that no longer is what its configuration says."""
    if part == "meta":
        with torch.device("meta"):
            return HNetLM(CONFIG)
    model = HNetLM(HNetConfig.from_dict({**CONFIG.to_dict(), "tie_embeddings": part == "tied"}))
    model.lm_head = torch.nn.Linear(32, 256, bias=part == "bias")
    return model


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("meta", "the model does not fit .* is on the meta device and has no values"),
        ("bias", "the model does not fit .*: lm_head.bias is not of this model"),
        ("tied", "the model: lm_head.weight differs from embeddings.weight"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, part: str, message: str) -> None:
    model = broken(part)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        model.save_official(tmp_path / "model.json", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_an_official_folder_needs_no_configuration(tmp_path: Path) -> None:
    """What the hub holds for a published model: NAME/NAME.pt, and the preset knows the rest."""
    folder = tmp_path / "hnet_1stage_S"
    folder.mkdir()
    model = HNetLM(HNetConfig.preset("hnet_1stage_S"))
    model.save_official(tmp_path / "x.json", folder / "hnet_1stage_S.pt")
    assert same_state(HNetLM.from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("text", "reason"), [("Name not known\nand much more", "Name not known"), ("", "OSError")]
)
def test_the_hub_without_a_network_says_so(
    monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    def no_network(*_: object, **__: object) -> str:
        raise OSError(text)

    hub = SimpleNamespace(snapshot_download=no_network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    message = rf"is no directory, and the hub did not give it either \({reason}\)$"
    with pytest.raises(ValueError, match=message):
        HNetLM.from_pretrained("cartesia-ai/hnet_1stage_L")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = (
        "name_or_path: there is no directory 'nothere', and to look for it on the hub, "
        r"huggingface-hub is missing: pip install 'h-net-dynamic-chunking\[hub\]'$"
    )
    with pytest.raises(ImportError, match=message):
        HNetLM.from_pretrained("nothere")


HEAD = torch.zeros(256, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lm_head.weight", None, "lm_head.weight is missing"),
        ("backbone.encoder.extra", torch.zeros(1), "backbone.encoder.extra is not of this model"),
        ("lm_head.weight", torch.zeros(300, 32), "lm_head.weight has shape .300, 32., wanted"),
        ("backbone.routing_module.q_proj_layer.weight", None, "q_proj_layer.weight is missing"),
        (
            "lm_head.weight",
            HEAD.long(),
            r"lm_head.weight has dtype torch\.int64, wanted a floating",
        ),
        ("lm_head.weight", HEAD.bool(), r"lm_head.weight has dtype torch\.bool"),
        ("lm_head.weight", HEAD.to_sparse(), "lm_head.weight is sparse or nested"),
        ("lm_head.weight", HEAD.to("meta"), "lm_head.weight is on the meta device"),
    ],
)
def test_faulty_tensors_are_named(
    official: tuple[HNetLM, Path, Path], key: str, value: torch.Tensor | None, message: str
) -> None:
    _, config, weights = official
    state = dict(torch.load(weights, weights_only=True))
    state.pop(key, None)
    if value is not None:
        state[key] = value
    torch.save(state, weights)
    with pytest.raises(ValueError, match=rf"model\.pt does not fit the configuration: .*{message}"):
        HNetLM.from_official(config, weights)


def test_integers_in_safetensors_are_named(
    official: tuple[HNetLM, Path, Path], tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    official[0].save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    safetensors.save_file(safetensors.load_file(path) | {"lm_head.weight": HEAD.to(int)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .* torch\.int64"):
        HNetLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, other: torch.dtype) -> None:
    config = HNetConfig.from_dict({"arch_layout": ["m1"], "d_model": [32], "tie_embeddings": True})
    tied = HNetLM(config)
    with torch.no_grad():
        tied.embeddings.weight[3, 4] = torch.nan  # even this is equal to itself
    tied.save_official(tmp_path / "model.json", tmp_path / "model.pt")
    loaded = HNetLM.from_official(tmp_path / "model.json", tmp_path / "model.pt")
    assert loaded.lm_head.weight is loaded.embeddings.weight
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"].roll(1).to(other)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: lm_head.weight differs from embeddings"):
        HNetLM.from_official(tmp_path / "model.json", tmp_path / "model.pt")


def test_weights_that_share_memory_in_the_file_do_not_in_the_model(
    official: tuple[HNetLM, Path, Path],
) -> None:
    model, config, weights = official
    state = dict(torch.load(weights, weights_only=True))
    shared = state["embeddings.weight"]
    torch.save(state | {"lm_head.weight": shared}, weights)
    loaded = HNetLM.from_official(config, weights)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert torch.equal(loaded.embeddings.weight, model.embeddings.weight)
    torch.save(state | {"lm_head.weight": shared[:1].expand(256, -1)}, weights)
    with torch.no_grad():
        HNetLM.from_official(config, weights).lm_head.weight.zero_()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "bfloat16"])
def test_a_dtype_that_weights_cannot_have_is_named(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be a floating-point"):
        HNetLM.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be a floating-point"):
        HNetLM.from_official(CONFIG, tmp_path / "model.pt", dtype=dtype)


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    """In each format that torch.save has had, and bare; nothing of it runs, nor is that advised."""
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    content = {"lm_head.weight": Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"model\.pt") as caught:
        read_weights(path)
    assert ("before torch 1.6" if legacy else "is refused") in str(caught.value)
    assert ("weights_only" in str(caught.value)) == legacy
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"model\.pt is not a torch checkpoint"):
        read_weights(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


class Allocated(TorchDispatchMode):
    """Adds up the bytes of the new memory that operations on the CPU take."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {memory.data_ptr() for memory in self._memories((args, kwargs))}
        after = {memory.data_ptr(): memory.nbytes() for memory in self._memories(out)}
        self.bytes += sum(size for place, size in after.items() if place not in before)
        return out

    @staticmethod
    def _memories(tree: Any) -> list[torch.UntypedStorage]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return [t.untyped_storage() for t in tensors if t.device.type == "cpu"]


def test_loading_takes_no_second_copy(official: tuple[HNetLM, Path, Path], tmp_path: Path) -> None:
    """The tensors of the mapped file become the parameters; only routers are put together."""
    pytest.importorskip("safetensors")
    model, config, weights = official
    model.save_pretrained(tmp_path)
    with Allocated() as loading:
        HNetLM.from_pretrained(tmp_path)
    assert loading.bytes == 0
    with Allocated() as loading:
        HNetLM.from_official(config, weights)
    routers = [p.nbytes for name, p in model.named_parameters() if "to_queries_keys" in name]
    assert loading.bytes == sum(routers)
    with Allocated() as creating:
        HNetLM(CONFIG)
    assert creating.bytes > sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": HEAD}}, "by name and nothing else, .* got dict at 'model'"),
        ({"a": HEAD, "step": 3}, "got int at 'step'"),
        ({0: HEAD}, "got Tensor at 0"),
        ([HEAD], "must hold a state dict of tensors, got list"),
        (HEAD, "must hold a state dict of tensors, got Tensor"),
        (torch.nn.Linear(1, 1), "is refused"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt .*{message}"):
        read_weights(tmp_path / "model.pt")


# torch's remark on a damaged first byte.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Cut anywhere, or with other bytes in the pickle, which fails in many ways."""
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(300.0), "b": torch.zeros(2, 3)}, path)
    whole = path.read_bytes()
    first = whole.index(b"data.pkl") + len(b"data.pkl")
    numbers = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[first + numbers.randrange(200)] = numbers.randrange(256)
        for content in (damaged, whole[: numbers.randrange(len(whole))]):
            path.write_bytes(content)
            # Other bytes may well make another state dict.
            with contextlib.suppress(ValueError):
                read_weights(path)
    for size in (0, 1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.pt is (truncated|not a torch checkpoint)"):
            read_weights(path)


def test_truncated_and_missing_files(official: tuple[HNetLM, Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, config, weights = official
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.pt is truncated"):
        HNetLM.from_official(config, weights)
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.pt"):
        HNetLM.from_official(config, tmp_path / "nowhere.pt")
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"model\.safetensors is truncated, or not safetensors"
        ):
            HNetLM.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        HNetLM.from_pretrained(tmp_path / "saved")
