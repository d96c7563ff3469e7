"""A training step as one CUDA graph: forward, backward, clipping, optimizer, launched at once.

A small model is bound by its launches: the host needs longer to queue the kernels of a step than a
GPU to run them. Recorded once, they are queued together. That needs static shapes and a host that
reads nothing, as an HNetLM has with `max_chunks` on batches that are padded and without `lens`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from h_net_dynamic_chunking.training.optimizer import GRADIENT_NORM

# torch wants a few steps before a recording, in which libraries choose and load their kernels.
_EAGER_STEPS = 3


class GraphedStep:
    """Trains by one batch a call; on a GPU as a CUDA graph, elsewhere operation by operation.

    The first calls run operation by operation everywhere; they train as well as the others. A
    graph holds the addresses of weights, gradients and optimizer state: load what is to be loaded
    before the first call, and change weights in place after it. Learning rates become tensors, so
    that `set_learning_rate` reaches the graph; numbers put in their place reach it, too.

    Args:
        losses_of: the inputs of a call -> the loss, a scalar, and after it other tensors that the
            caller wants back. On a GPU it must not read a tensor on the host.
        optimizer: one that can be recorded, such as `adamw` makes. Its parameters are clipped.
        max_norm: of all gradients together, which are scaled down to it.
        graphed: False keeps to single operations on a GPU, too.

    Raises:
        ValueError: losses_of cannot be called, optimizer is none, or max_norm is not above 0.

    >>> from h_net_dynamic_chunking import HNetConfig, HNetLM
    >>> from h_net_dynamic_chunking.training.optimizer import adamw
    >>> model = HNetLM(HNetConfig.preset("hnet_1stage_S"), max_chunks=[16])
    >>> optimizer = adamw(model.parameter_groups(weight_decay=0.1), 1e-3)
    >>> step = GraphedStep(lambda ids: [model(ids[:, :-1], ids[:, 1:]).loss], optimizer)
    >>> (loss,) = step(torch.randint(256, (2, 65)))
    """

    def __init__(
        self,
        losses_of: Callable[..., Sequence[Tensor]],
        optimizer: torch.optim.Optimizer,
        max_norm: float = GRADIENT_NORM,
        *,
        graphed: bool = True,
    ) -> None:
        if not callable(losses_of):
            raise ValueError(f"losses_of must be callable, got {type(losses_of).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not isinstance(max_norm, (int, float)) or not max_norm > 0:
            raise ValueError(f"max_norm must be a number above 0, got {max_norm!r}")
        self._losses_of, self._optimizer, self._max_norm = losses_of, optimizer, max_norm
        self._graphed = graphed
        self._eager_steps = 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []
        self._rates: list[Tensor] = []
        self._state: object = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """One step of training by `inputs`, which have the same shapes and dtypes in every call.

        Returns:
            What `losses_of` returned, without gradients.

        Raises:
            ValueError: no inputs, or others than tensors; inputs of other shapes or dtypes than
                those that were recorded, or an optimizer that was loaded since; or `losses_of`
                returned something else than it should. Weights are as they were then.
        """
        if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
            got = [type(tensor).__name__ for tensor in inputs]
            raise ValueError(f"inputs must be one tensor or more, got {got}")
        if not self._graphed or not inputs[0].is_cuda:
            return self._take(inputs)
        with torch.cuda.device(inputs[0].device):
            if self._graph is None:
                if self._eager_steps < _EAGER_STEPS:
                    return self._take_aside(inputs)
                self._record(inputs)
            return self._replay(inputs)

    def _take(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._optimizer.zero_grad()
        results = self._losses_of(*inputs)
        _check_results(results)
        results[0].backward()  # type: ignore[no-untyped-call]  # torch's
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self._max_norm)
        self._optimizer.step()
        return [result.detach() for result in results]

    def _take_aside(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """On the stream that will be recorded, which autograd remembers for each parameter."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            for group in self._optimizer.param_groups:
                group["capturable"] = True
                group["lr"] = torch.as_tensor(group["lr"], device=inputs[0].device)
                self._rates.append(group["lr"])
        self._eager_steps += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._take(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return [result.clone() for result in results]

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._optimizer.zero_grad()  # so that gradients live in the memory of the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._results = self._take(self._inputs)
        self._graph = graph
        self._state = self._optimizer.state

    def _replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        assert self._graph is not None
        got, recorded = (
            [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
            for tensors in (inputs, self._inputs)
        )
        if got != recorded:
            raise ValueError(f"inputs must be {recorded}, as those recorded, got {got}")
        if self._optimizer.state is not self._state:
            raise ValueError(
                "optimizer must keep the state that was recorded, and was loaded since: make a new "
                "GraphedStep after load_state_dict"
            )
        self._refill_rates()
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return [result.clone() for result in self._results]

    def _refill_rates(self) -> None:
        """Learning rates that were put in the place of the recorded tensors, into those."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate


def _check_results(results: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are a loss that can be derived, and perhaps more tensors."""
    wanted = "losses_of must return a sequence of tensors, the first a scalar with a gradient"
    if isinstance(results, Tensor) or not isinstance(results, Sequence) or not results:
        empty = " without any" if isinstance(results, Sequence) else ""
        raise ValueError(f"{wanted}; got {type(results).__name__}{empty}")
    if not all(isinstance(result, Tensor) for result in results):
        raise ValueError(f"{wanted}; got {[type(result).__name__ for result in results]}")
    loss = results[0]
    if loss.ndim or not loss.requires_grad:
        raise ValueError(
            f"{wanted}; got one of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
        )
