"""Where the time of a training step goes: kernels by component, each beside its floor.

A kernel belongs to the module whose forward pass launched it, or launched the operation whose
gradient it computes; inside a module its name tells products from the rest.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from train_cases import COPY, DEVICE, PRODUCTS, Case, Trainer, table

from h_net_dynamic_chunking.config_checks import MAMBA_HEAD_DIM
from h_net_dynamic_chunking.layers import parse_layout
from h_net_dynamic_chunking.layers.mlp import swiglu_width

LABEL = "component:"
MODULES = {
    "Mamba2": "mamba",
    "CausalAttention": "attention",
    "SwiGLU": "mlp",
    "Isotropic": "stack",
    "Embedding": "embedding",
    "DynamicSequenceChunker": "chunker",
    "HNet": "h_net",
}
IS_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|splitk|gemv|::b?mm", re.I)
IS_ATTENTION = re.compile(r"flash|fmha|attn|attention|sdpa|cudnn", re.I)


def component(kernel: str, path: tuple[str, ...]) -> str:
    """The row of the table that a kernel belongs to.

    >>> component("nvjet_hsh_128x256", ("stack", "mamba"))
    'Mamba products'
    """
    product = bool(IS_PRODUCT.search(kernel))
    if "optimizer" in path:
        return "optimizer"
    if "mamba" in path:
        if "ssd" in kernel:
            return "SSD"
        if product:
            return "Mamba products"
        if "conv" in kernel:
            return "causal convolution"
        if "norm" in kernel:
            return "gated norm"
        return "Mamba, other"
    if "attention" in path:
        if IS_ATTENTION.search(kernel):
            return "attention"
        return "attention products" if product else "rotary and other of attention"
    if "mlp" in path:
        return "MLP products" if product else "SwiGLU"
    if "chunker" in path:
        return "chunker products" if product else "chunking"
    if "head" in path or "loss" in path:
        return "head product" if product else "cross entropy"
    if "embedding" in path:
        return "embedding"
    if "stack" in path:
        return "norms and residual stream"
    return "widths and other"


# ---- floors


def floors(case: Case) -> dict[str, tuple[float, float]]:
    """Bytes that must move and FLOPs that must be done, forward, backward and in the optimizer.

    Every operation reads its inputs and writes its outputs once, in bfloat16, the residual stream
    in float32; a backward pass reads what the forward pass read. Attention is causal here.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, moved: float = 0.0, flops: float = 0.0) -> None:
        found[name][0] += moved
        found[name][1] += flops

    config, positions = case.config, case.positions()
    for level, layouts in enumerate(config.levels()):
        n, width = positions[level], config.d_model[level]
        for layout in layouts:
            _add_stack(add, case, level, parse_layout(layout))
        if level < config.stages:
            chunks = positions[level + 1]
            add("chunker products", flops=3 * 2 * n * width * 3 * width)
            # Queries and keys (3 times), gathering, smoothing and expansion, residual.
            add("chunking", 12 * n * width + 2 * width * (3 * n + 8 * chunks) + 12 * n * width)
    n, width, vocabulary = positions[0], config.d_model[0], config.vocab_size
    add("embedding", 4 * n * width)
    add("head product", flops=3 * 2 * n * width * vocabulary)
    add("cross entropy", 6 * n * vocabulary)
    with torch.device("meta"):
        parameters = _parameters(case)
    add("optimizer", 14 * parameters)  # reads weight, gradient and two moments, writes three
    return {name: (moved, flops) for name, (moved, flops) in found.items()}


def _add_stack(
    add: Callable[..., None], case: Case, level: int, layout: list[tuple[str, int]]
) -> None:
    config, n, width = case.config, case.positions()[level], case.config.d_model[level]
    ssm = config.ssm_cfg
    inner, state = ssm.expand * width, ssm.d_state
    heads, channels = inner // MAMBA_HEAD_DIM, inner + 2 * state
    for letter, count in layout:
        norms = 1
        if letter.lower() == "m":
            projections = width * (inner + channels + heads) + inner * width
            add("Mamba products", flops=count * 6 * n * projections)
            add(
                "SSD",
                count * n * (10 * inner + 12 * state + 16 * heads),
                count * 12 * n * inner * state,
            )
            add("causal convolution", count * 10 * n * channels)
            add("gated norm", count * 16 * n * inner)
        else:
            window = config.attn_cfg.window_size[level]
            pairs = sum(_pairs(length, window) for length in case.lengths_by_level()[level])
            add("attention products", flops=count * 6 * n * 4 * width * width)
            # Two products forward, five backward.
            add("attention", count * 24 * n * width, count * 7 * 2 * pairs * width)
            turned = config.attn_cfg.rotary_emb_dim[level] * config.attn_cfg.num_heads[level]
            add("rotary and other of attention", count * 16 * n * turned)
        if letter.isupper():
            norms = 2
            wide = swiglu_width(width, config.d_intermediate[level])
            add("MLP products", flops=count * 6 * n * 3 * width * wide)
            add("SwiGLU", count * 16 * n * wide)
        add("norms and residual stream", count * norms * 28 * n * width)


def _pairs(length: int, window: int) -> int:
    """Pairs of a position and one that it sees."""
    seen = length if window < 0 else min(window + 1, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _parameters(case: Case) -> int:
    from h_net_dynamic_chunking import HNetLM

    return HNetLM(case.config).num_parameters()


# ---- measurement


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Inside, every module says in the profile where it begins and ends."""
    undo: list[Callable[[], None]] = []

    def mark(owner: nn.Module, name: str, label: str) -> None:
        """Replace a method; a hook would not see what is not a module's forward."""
        old = getattr(owner, name)

        def function(*arguments: Any, **options: Any) -> Any:
            with record_function(LABEL + label):
                return old(*arguments, **options)

        setattr(owner, name, function)
        undo.append(lambda: delattr(owner, name))

    for name, module in model.named_modules():
        kind = type(module).__name__
        label = "head" if name == "lm_head" else MODULES.get(kind)
        if label == "chunker":
            for method in ("run", "_upsample"):
                mark(module, method, label)
        elif label is not None:
            mark(module, "forward", label)
    mark(model, "_cross_entropy", "loss")
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


def kernel_times(trainer: Trainer) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Milliseconds of a step by component; and for each its kernels: name, ms, launches."""
    with labelled(trainer.model):
        trainer.step()
        activities = [ProfilerActivity.CPU]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=True) as profiler:
            # One step: the profiler needs 0.1 ms for each event, and a step has up to 100,000.
            trainer.forward_backward()
            with record_function(LABEL + "optimizer"):
                trainer.optimizer.step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
    events = profiler.events()
    forward = _forward_paths(events)
    times: dict[str, float] = defaultdict(float)
    kernels: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    attributed = 0.0
    for event in events:
        for name, microseconds in _work(event):
            ms = microseconds / 1e3
            row = component(name, _path(event, forward))
            times[row] += ms
            entry = kernels[row][name[:60]]
            entry[0] += ms
            entry[1] += 1
            attributed += ms
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    everything = (
        sum(e.time_range.elapsed_us() for e in on_device if not e.name.startswith(LABEL)) / 1e3
    )
    times["all kernels on the device"] = everything if DEVICE == "cuda" else attributed
    listed = {
        row: sorted(([n, *e] for n, e in found.items()), key=lambda k: -k[1])
        for row, found in kernels.items()
    }
    times["of them in the rows above"] = attributed
    return dict(times), listed


def _work(event: Any) -> list[tuple[str, float]]:
    """Kernels that an operation launched, each with its us; on a CPU the operation itself."""
    if DEVICE == "cuda":
        return [(kernel.name, kernel.duration) for kernel in event.kernels]
    return (
        [(event.name, event.self_cpu_time_total)]
        if event.name.startswith(("aten", "h_net"))
        else []
    )


def _forward_paths(events: Any) -> dict[int, tuple[str, ...]]:
    """Sequence number of a node of the graph -> labels around the operation that made it."""
    made: dict[int, Any] = {}
    for event in events:
        number = event.sequence_nr
        if number is None or number < 0 or event.name.startswith("autograd::"):
            continue
        if _backward_event(event) is not None:
            continue
        # The last to begin with a number is the one that makes the node.
        if number not in made or made[number].time_range.start <= event.time_range.start:
            made[number] = event
    return {number: _labels(event) for number, event in made.items()}


def _path(event: Any, forward: dict[int, tuple[str, ...]]) -> tuple[str, ...]:
    node = _backward_event(event)
    if node is None:
        return _labels(event)
    return _labels(event) or forward.get(node.sequence_nr, ())


def _backward_event(event: Any) -> Any:
    """The event of the node of the graph in whose backward pass this one happened, if any."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def _labels(event: Any) -> tuple[str, ...]:
    labels = []
    while event is not None:
        if event.name.startswith(LABEL):
            labels.append(event.name[len(LABEL) :])
        event = event.cpu_parent
    return tuple(reversed(labels))


def report(case: Case, details: int = 0) -> str:
    """The table of one model: measured and floor by component; then its longest kernels."""
    trainer = Trainer(case, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    times, kernels = kernel_times(trainer)
    least = floors(case)
    rows, total = [], 0.0
    for name in sorted(least.keys() | kernels.keys(), key=lambda n: -times.get(n, 0.0)):
        moved, flops = least.get(name, (0.0, 0.0))
        floor = 1e3 * max(moved / COPY, flops / PRODUCTS)
        total += floor
        measured, launches = times.get(name, 0.0), sum(k[2] for k in kernels.get(name, []))
        share = f"{floor / measured:.0%}" if measured else ""
        rows.append([name, f"{measured:.2f}", f"{floor:.2f}", share, f"{launches:.0f}"])
    everything = times["all kernels on the device"]
    launches = sum(k[2] for found in kernels.values() for k in found)
    share = f"{total / everything:.0%}" if everything else ""
    rows.append(["all kernels", f"{everything:.2f}", f"{total:.2f}", share, f"{launches:.0f}"])
    header = [f"{case.name}, a step with optimizer", "ms", "floor, ms", "of it", "kernels"]
    text = table(header, rows)
    missing = everything - times["of them in the rows above"]
    if everything and abs(missing) > 0.01 * everything:
        text += f"\n{missing:.2f} ms of kernels belong to no operation that the profiler knows"
    for name in sorted(kernels, key=lambda n: -times[n]) if details else []:
        for kernel, ms, launches in kernels[name][:details]:
            text += f"\n  {name:30} {ms:8.3f} ms {launches:6.0f} x  {kernel}"
    return text
