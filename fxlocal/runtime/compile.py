"""Hand a network to `torch.compile` or to CUDA graphs, and never fall back in silence."""

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from platform import machine
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from ..compiler.analysis import Analysis
from ..compiler.blocks import CutNetwork, count_codes, describe
from ..compiler.resolve import ResolvedPlan
from ..errors import NoEffectWarning, PlanError
from ..ir.network import Network
from ..ir.source import device_of
from ..ir.text import format_graph
from ..ops.local_modules import let_backward_compile
from .cudagraph import GraphedNetwork

__all__ = ["BlockwiseNetwork", "ByModule", "Compiler", "How", "compile_blocks", "compile_network"]

How: TypeAlias = bool | Literal["blocks", "cudagraph"] | Mapping[str, Any]


class Compiler:
    """Makes the callable of each network: itself, its compiled form, or its CUDA graphs.

    Args:
        how: as a `fxlocal.Driver` is told to compile.
        folder: where to keep what torch has compiled for the next process; None for nowhere.

    Attributes:
        blocks: what compiles blocks, the same for all networks.

    Raises:
        ValueError: if ``how`` is none of the ways of a driver, or torch.compile takes no such
            options; or there is no such folder.
    """

    def __init__(self, how: How, folder: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(how, (bool, Mapping)) and how not in ("blocks", "cudagraph"):
            raise ValueError(
                f"compile={how!r}: give True, 'blocks', a dict of torch.compile's keyword "
                "arguments, or 'cudagraph'"
            )
        if isinstance(how, Mapping):
            try:
                torch.compile(nn.Identity(), **how)  # which compiles nothing yet
            except Exception as error:
                raise ValueError(f"compile={how!r}: {error}") from error
        if folder is not None and how in (False, "cudagraph"):
            raise ValueError(f"artifacts={folder!r}: compile={how!r} makes none; give True")
        self.how, self.blocks = how, BlockCompiler({})
        self.reason, self._starts = "", frozenset[str]()
        self._by_block, self._folder = how == "blocks", folder
        self._artifacts: Artifacts | None = None
        self._num_whole = 0

    def __call__(self, network: Network) -> Callable[..., Any]:
        """Return what runs ``network``."""
        if self.how is False:
            return network
        if self.how == "cudagraph":
            _refuse_unsteady(network, "a CUDA graph")
            return GraphedNetwork(network)
        if self._by_block:
            return _by_block(network, self._starts, self.blocks)
        self._num_whole += 1
        return compile_network(network, self.how if isinstance(self.how, Mapping) else {})

    def expect(
        self, captured: Network, analysis: Analysis, plans: Collection[ResolvedPlan]
    ) -> None:
        """Choose between blocks and whole networks, for those of ``plans``."""
        num_blocks = len(analysis.blocks)
        self._starts = _starts_of(analysis)
        if self.how == "blocks" and num_blocks < 2:
            self._by_block, self.reason = False, f"whole, as {_NO_EDGES}"
            warnings.warn(f"compile='blocks': {_NO_EDGES}: {_WHOLE}", NoEffectWarning, stacklevel=4)
        if self.how is True and plans:
            codes, num_plans = count_codes(captured, analysis, plans), len(plans)
            self._by_block = num_plans > 1 and 2 * codes <= num_plans * num_blocks
            self.reason = (
                f"{'by block' if self._by_block else 'whole'}; codes of blocks, equal ones shared: "
                f"{codes}, Plans x blocks: {num_plans} x {num_blocks} (by block where that halves "
                "what several Plans compile, else whole, as steps are faster)"
            )
        if self._folder is not None:
            self._artifacts = Artifacts(self._folder, captured)

    def save(self) -> None:
        """Keep what was compiled since for the next process, if there is a folder."""
        if self._artifacts is not None:
            self._artifacts.save(len(self.blocks.codes) + self._num_whole)

    def explain(self) -> str:
        """Say how networks are compiled, and why."""
        lines = [f"compile={self.how!r}" + (f": {self.reason}" if self.reason else "")]
        if self._by_block:
            kinds, codes = len(self.blocks.kinds), len(self.blocks.codes)
            lines.append(f"{kinds} kinds of blocks met so far, compiled {codes} times in all")
        if self._artifacts is not None:
            lines.append(f"artifacts: {self._artifacts.told}")
        return "\n".join(lines)


_NO_EDGES = "the graph has no block edges"
_WHOLE = "each Plan is compiled as a whole"


def _refuse_unsteady(network: Network, what: str) -> None:
    """Refuse a network that runs other nodes, or on another number of rows, in each step."""
    drop = network.history.plan.drop if network.history else None
    if drop is not None and (drop.mode == "block" or drop.replace):
        reason = "other blocks" if drop.mode == "block" else "another number of rows"
        raise PlanError(
            f"{drop!r}: each step computes {reason}, which {what} cannot hold. Give compile=False, "
            "or StochasticDepth(mode='row')"
        )


def compile_network(network: Network, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile ``network`` as one graph; local modules one by one, if it cannot hold them.

    It cannot with replay buffers between them, or where Dynamo traces no backward.
    Each network has code of its own, so each Plan is compiled once and shares no recompile limit
    with another. A graph break is an error, as `torch.compile` would then run parts in eager,
    unless its ``options`` say ``fullgraph=False``.

    Raises:
        PlanError: if stochastic depth has other nodes, or shapes, in each step.
    """
    _refuse_unsteady(network, "one compiled graph")
    options = {"fullgraph": True, **options}
    added = network.fxlocal
    if added.loss_scale is not None and (added.replay is not None or not let_backward_compile()):
        return ByModule(network, options)
    compiled: Callable[..., Any] = torch.compile(network, **options)
    return compiled


def compile_blocks(network: Network, **options: Any) -> Callable[..., Any]:
    """Compile ``network`` block by block, with one compiled code for equal blocks.

    It learns as the whole network does. Blocks are equal where their graphs, the shapes of all that
    they take, and what of it asks for gradients agree. A network without block edges is compiled
    as a whole, with a `NoEffectWarning`.

    Args:
        network: what `fxlocal.transform` returned.
        options: keyword arguments of `torch.compile`; ``fullgraph`` is True by default.

    Returns:
        A module with the network's attributes.

    Raises:
        TypeError: if it is not what `transform` returned.
        PlanError: if stochastic depth has other nodes, or shapes, in each step; or weights are in
            shards.

    Example:
        >>> from fxlocal import Freeze, LocalPrefix, Plan, transform
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        >>> net = transform(model, Plan(local=LocalPrefix(3)))
        >>> compiled = compile_blocks(net, backend="eager")
        >>> compiled(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """
    if not isinstance(network, Network) or "rewrite" not in network.meta:
        raise TypeError(
            f"compile_blocks: {type(network).__name__} is not what fxlocal.transform returned; "
            "transform the model first, with Plan() if nothing is to be changed"
        )
    starts = _starts_of(network.meta["rewrite"].keywords["analysis"])
    return _by_block(network, starts, BlockCompiler(options))


def _starts_of(analysis: Analysis) -> frozenset[str]:
    return frozenset(block.start for block in analysis.blocks)


def _by_block(
    network: Network, starts: frozenset[str], compiler: "BlockCompiler"
) -> Callable[..., Any]:
    _refuse_unsteady(network, "compiled code")
    if "shard" in network.meta:
        raise PlanError(
            "compile_blocks: FSDP2 gathers weights by hooks of modules, which are in no block. "
            "Leave the network as it is"
        )
    if len(starts) < 2:
        warnings.warn(f"compile_blocks: {_NO_EDGES}: {_WHOLE}", NoEffectWarning, stacklevel=3)
        return compile_network(network, compiler.options)
    return BlockwiseNetwork(network, starts, compiler)


class BlockCompiler:
    """Compiles each kind of block once in each role, for all networks of a model.

    The role is what is known of a block's inputs in its first call: shapes, which ask for
    gradients, and whether these are recorded. So it is in the code that is called, and a boundary
    that moves calls other code.

    Args:
        options: keyword arguments of `torch.compile`.

    Attributes:
        kinds: each kind of block that was met, and its number.
        codes: what was compiled, by kind and role.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {"fullgraph": True, **options}
        self.kinds: dict[Hashable, int] = {}
        self.codes: dict[Hashable, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "kinds": {}, "codes": {}}  # code is compiled anew

    def make_block(self, kind: Hashable, graph: fx.Graph) -> Callable[..., Any]:
        """Return a function that runs ``graph``, and finds its code in the first call."""
        code: Callable[..., Any] | None = None

        def block(*inputs: Any) -> Any:
            nonlocal code
            if code is None:
                code = self._find(kind, graph, inputs)
            return code(None, *inputs)

        block.__name__ = f"block_{self.kinds.setdefault(kind, len(self.kinds))}"
        return block

    def _find(self, kind: Hashable, graph: fx.Graph, inputs: Sequence[Any]) -> Callable[..., Any]:
        role = kind, torch.is_grad_enabled(), tuple(map(describe, inputs))
        if role not in self.codes:
            forward = type(fx.GraphModule(nn.Module(), graph)).forward  # a code object of its own
            self.codes[role] = torch.compile(forward, **self.options)
        return self.codes[role]


class BlockwiseNetwork(nn.Module):
    """A network that runs block by block.

    Its attributes are those of the network, ``_orig_mod``, as in the wrapper of `torch.compile`.

    Args:
        network: what `fxlocal.transform` returned.
        starts: names of the nodes at which blocks begin.
        compiler: compiles blocks.
    """

    def __init__(self, network: Network, starts: Collection[str], compiler: BlockCompiler) -> None:
        super().__init__()
        self._orig_mod = network
        self._starts, self._compiler = starts, compiler
        self._cuts: dict[int, tuple[fx.Graph, CutNetwork]] = {}

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["_orig_mod"], name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cuts": {}}

    @property
    def training(self) -> bool:
        """The network's mode, which is the model's."""
        return "_orig_mod" not in self.__dict__.get("_modules", {}) or self._orig_mod.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # train() sets it of the network too

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network."""
        whole = chosen = self._orig_mod
        whole.prepare_call(*inputs, **named)
        if "choose" in whole.meta:
            chosen = whole.meta["choose"](whole)
        return whole.finish_call(self.cut(chosen).forward(*inputs, **named))

    def cut(self, network: Network) -> CutNetwork:
        """Return the network, or a variant of it, as calls of blocks."""
        graph, found = self._cuts.get(id(network), (None, None))
        if found is None or graph is not network._graph:
            found = CutNetwork(network, self._starts, self._compiler.make_block)
            self._cuts[id(network)] = network._graph, found
        return found


class Artifacts:
    """What torch compiled, in a file of this torch, device and model, for the next process.

    Args:
        folder: where it lies, or will.
        captured: the model's graph, of which the kinds of blocks are made.

    Attributes:
        told: what became of it.

    Raises:
        ValueError: if there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], captured: Network) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"artifacts={str(folder)!r}: there is no such folder; make it")
        device = device_of(captured.source_model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
        shapes = [(n, p.shape, p.dtype) for n, p in captured.source_model.named_parameters()]
        key = f"{torch.__version__} {name} {format_graph(captured)} {shapes}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.file, self.told, self._saved = Path(folder) / f"{digest}.artifacts", "none yet", 0
        if self.file.exists():
            loaded = torch.compiler.load_cache_artifacts(self.file.read_bytes())
            self.told = f"{'loaded' if loaded else 'damaged, to be made anew'}: {self.file}"

    def save(self, count: int) -> None:
        """Write the file if more than at the last time, ``count`` codes, were compiled."""
        if count == self._saved or (found := torch.compiler.save_cache_artifacts()) is None:
            return
        self._saved = count
        written = self.file.with_suffix(f".{os.getpid()}")
        try:
            written.write_bytes(found[0])
            written.replace(self.file)
            self.told = f"saved: {self.file}, {len(found[0])} bytes"
        except OSError as error:  # a disk that is full: the run goes on
            written.unlink(missing_ok=True)
            self.told = f"not saved: {error}"
            warnings.warn(f"artifacts: {self.told}", stacklevel=4)


class ByModule(BlockwiseNetwork):
    """A network whose local modules are compiled one by one, with eager backwards between them.

    Args:
        network: with local modules.
        options: keyword arguments of `torch.compile`.
    """

    def __init__(self, network: Network, options: Mapping[str, Any]) -> None:
        super().__init__(network, frozenset(), BlockCompiler(options))
