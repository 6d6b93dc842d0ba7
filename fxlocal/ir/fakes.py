"""Run a graph once on fake tensors: shapes, dtypes and strides, but no data and no arithmetic.

Each node runs in its own contexts, as in the generated code, under whatever autocast the caller is
in. What the analyses ask of shapes, FLOPs and memory is read from this one run, and each node
keeps what its value looks like in ``node.meta["val"]``, by which graphs are printed.

FLOPs are those of `torch.utils.flop_counter`, and of every fused attention: also of the CPU's,
which that counter leaves out.
"""

import functools
import logging
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..facts import TensorSpec
from .contexts import ContextInterpreter
from .operators import is_plain, operator_name
from .source import arguments

__all__ = [
    "ExamplesError",
    "FakeRun",
    "is_of_batch",
    "is_row_count",
    "rows_of",
    "run_on_fakes",
    "shape_of",
    "with_fake_state",
]


class ExamplesError(CaptureError):
    """A graph does not run on example inputs."""


@dataclass(frozen=True)
class FakeRun:
    """What one run on fake tensors met, by the names of nodes.

    Attributes:
        values: what each node made: a `TensorSpec` in the place of each tensor, in the containers
            that hold it. Values of which nothing is known are left out.
        flops: floating-point operations of each node's forward; only where there are any.
        saved: storages that autograd keeps for a node, each a key with its bytes; parameters,
            buffers and inputs excluded.
        made: storages of the tensors that a node makes, likewise.
    """

    values: Mapping[str, Any]
    flops: Mapping[str, int]
    saved: Mapping[str, Mapping[int, int]]
    made: Mapping[str, Mapping[int, int]]


def run_on_fakes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], by_name: Mapping[str, Any] | None = None
) -> FakeRun:
    """Interpret ``gm`` on fake copies of its state and of ``example_inputs``.

    Args:
        gm: the graph; fills ``meta["val"]`` of its nodes with what `FakeRun.values` holds.
        example_inputs: one batch of inputs; only shapes, dtypes and devices are used.
        by_name: those of them that are given by keyword.

    Raises:
        CaptureError: if it does not run on them, naming the node; an `ExamplesError` if they do
            not fit.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    meter = _FlopMeter()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Let torch's attention and encoder layers call operators whose FLOPs are known.
        mha = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        state = _fake_state(gm, mode, stack)
        values = arguments(gm.graph, example_inputs, by_name).values()
        inputs = [_faked(mode, v) if isinstance(v, Tensor) else v for v in values]
        given = [*state, *(v for v in inputs if isinstance(v, Tensor))]
        stack.enter_context(mode)
        stack.enter_context(meter)
        keeper = _Keeper({_storage_key(tensor) for tensor in given})
        recorder = _Recorder(gm, meter, keeper)
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(keeper.note, _not_run_backward)
        )
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # of what is raised here
        stack.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        try:
            recorder.run(*inputs)
        except Exception as error:
            raise _refusal(keeper.node, inputs, error) from error
    return FakeRun(recorder.values, recorder.flops, keeper.saved, keeper.made)


def _refusal(node: str, inputs: Sequence[Any], error: Exception) -> CaptureError:
    given = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, Tensor))
    if isinstance(error, (DynamicOutputShapeException, DataDependentOutputException)):
        return CaptureError(
            f"what {node!r} makes depends on the values of tensors, so the shapes behind it are "
            "not known from shapes alone: costs, and Plans that need shapes (local modules, "
            "checkpointing, TopK), are not for this model. Analyse it without example inputs"
        )
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ExamplesError(
        f"the model does not run on example inputs of the shapes {given}: {node!r}: {reason}"
    )


@contextmanager
def with_fake_state(gm: fx.GraphModule) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put fake tensors in the place of the state of ``gm``; yield what makes a fake of a tensor."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        _fake_state(gm, mode, stack)
        stack.enter_context(mode)
        yield functools.partial(_faked, mode)


class _Recorder(ContextInterpreter):
    """Interprets a graph and notes what each node makes, computes and keeps."""

    def __init__(self, gm: fx.GraphModule, meter: "_FlopMeter", keeper: "_Keeper") -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}
        self.flops: dict[str, int] = {}
        self._meter, self._keeper = meter, keeper

    def run_node(self, n: fx.Node) -> Any:
        self._keeper.node, before = n.name, self._meter.total
        result = super().run_node(n)
        self._keeper.note_made(result)
        if self._meter.total > before:
            self.flops[n.name] = self._meter.total - before
        described = _described(result)
        if described is not _UNKNOWN and n.op != "output":
            self.values[n.name] = n.meta["val"] = described
        return result


class _Keeper:
    """Notes storages. It refers to no graph: autograd, which refers to it, may outlive.

    Storages whose keys are in ``ignored`` are not counted.
    """

    def __init__(self, ignored: set[int]) -> None:
        self.node = ""
        self.saved: dict[str, dict[int, int]] = {}
        self.made: dict[str, dict[int, int]] = {}
        self._ignored = ignored
        self._alive: list[Any] = []  # keeps storages alive, so that no key is used twice

    def note(self, tensor: Tensor) -> None:
        """Note a tensor, and let autograd keep nothing in its place."""
        self._note(self.saved, tensor)

    def note_made(self, value: Any) -> None:
        """Note the tensors in what the node made."""
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._note(self.made, leaf)

    def _note(self, found: dict[str, dict[int, int]], tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key not in self._ignored:
            storage = tensor.untyped_storage()
            self._alive.append(storage)
            found.setdefault(self.node, {})[key] = storage.nbytes()


def _not_run_backward(nothing: None) -> Tensor:
    raise RuntimeError("a run on fake tensors keeps nothing for a backward")


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_UNKNOWN = object()
_CONSTANTS = (int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout)


def _described(value: Any) -> Any:
    """Return ``value`` with a `TensorSpec` for each tensor; `_UNKNOWN` if it holds what is none."""
    known = (Tensor, type(None), *_CONSTANTS)
    if not all(isinstance(leaf, known) for leaf in pytree.tree_leaves(value)):
        return _UNKNOWN
    return pytree.tree_map_only(Tensor, _spec, value)


def _spec(tensor: Tensor) -> TensorSpec:
    stride = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(tuple(tensor.shape), name, tensor.device.type, stride)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of two products: query (..., L, E) with key, the scores with value.

    Keys and values may have fewer heads than queries, which share them.
    """
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_FUSED_ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


@functools.cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    """Return what counts the FLOPs of each operator."""
    from torch.utils.flop_counter import flop_registry  # imports Triton

    attentions = {getattr(torch.ops.aten, name): _attention_flops for name in _FUSED_ATTENTIONS}
    return ChainMap(attentions, flop_registry)


class _FlopMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as `torch.utils.flop_counter.FlopCounterMode`, but no module by itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def _fake_state(gm: fx.GraphModule, mode: FakeTensorMode, stack: ExitStack) -> list[Tensor]:
    """Put fake tensors in the place of parameters and buffers, each once; ``stack`` undoes it.

    Not `torch.func.functional_call`: it swaps a module that has two names twice, and puts back
    the wrong one.
    """
    fakes: dict[int, Tensor] = {}
    for module in gm.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            own = dict(tensors)
            stack.callback(tensors.update, own)
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _faked(mode, tensor)
                    tensors[name] = fakes[id(tensor)]
    return list(fakes.values())


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a fake of ``tensor``; that of an integer alone, such as a counter, has its value.

    Not `FakeTensorMode.from_tensor`: it leaves weak references, and no one can pickle the tensor.
    """
    size, stride = tensor.size(), tensor.stride()
    meta = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
    counts = tensor.dim() == 0 and not tensor.is_floating_point()
    value = tensor.detach().clone() if counts else None
    fake = FakeTensor(mode, meta, tensor.device, constant=value)
    return fake.requires_grad_(tensor.requires_grad)


def shape_of(value: fx.Node) -> tuple[int, ...]:
    """Return the shape that a run on example inputs noted; () of none."""
    return tuple(getattr(value.meta.get("val"), "shape", ()))


def rows_of(value: fx.Node) -> int | None:
    """Return the length of its first dimension, if that was noted."""
    return next(iter(shape_of(value)), None)


def is_of_batch(value: fx.Node, size: int | None) -> bool:
    """Tell whether a plain value may be made of the size of the batch, in dimension 0."""
    name, args = operator_name(value), value.args
    if name in ("getattr", "size", "sym_size"):
        if name == "getattr" and args[1] != "shape":
            return False
        whole = name == "getattr" or len(args) == 1 or args[1] == 0
        return bool(whole) and (size is None or rows_of(value.all_input_nodes[0]) in (None, size))
    if name == "getitem" and isinstance(args[1], int) and args[1] != 0:
        return False
    return any(is_of_batch(part, size) for part in value.all_input_nodes if is_plain(part))


def is_row_count(value: fx.Node) -> bool:
    """Tell whether a size that is of the batch is its number of rows itself."""
    name, part = operator_name(value), value.all_input_nodes[0]
    if name == "getitem" and value.args[1] == 0:
        return operator_name(part) in ("getattr", "size")
    return name in ("size", "sym_size") and len(value.args) > 1
