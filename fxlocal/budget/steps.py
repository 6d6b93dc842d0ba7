"""Take steps of a model by any Plan, on a copy, and measure what they keep and take."""

import copy
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.analysis import analyze
from ..compiler.resolve import resolve
from ..compiler.transform import rewrite
from ..errors import PlanError
from ..inspection.verify import copied, random_projection
from ..inspection.watch import RecordedTensors
from ..ir.network import Network
from ..ir.source import device_of, train_mode
from ..ops.local_modules import TARGET
from ..plan import Plan
from ..tracing.capture import capture
from .candidates import Times, prefix_of
from .kept import count_saved_bytes
from .times import clock, time_blocks

__all__ = ["Steps"]


class Steps:
    """Takes steps on a copy of a model, and measures them."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any], Tensor] | None,
        leaf_modules: tuple[type[nn.Module], ...],
    ) -> None:
        with RecordedTensors():
            self.model = copy.deepcopy(model.source_model if isinstance(model, Network) else model)
        if not self.model.training:
            self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.args, self.kwargs = args, kwargs
        self.loss = loss or random_projection
        self.captured = capture(self.model, *args, leaf_modules=leaf_modules, **kwargs)
        self.analysis = analyze(self.captured, *args, **kwargs)
        if not self.analysis.blocks:
            raise PlanError("auto: the model has no convolution and no linear layer to plan for")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise PlanError(
                "auto: no parameter of the model learns: it has none, or requires_grad is False "
                "for all; give a model of which a step trains something"
            )
        self.device = device_of(self.model)
        self.on_gpu = self.device.type == "cuda"

    def network(self, plan: Plan) -> Network:
        """Return the model rewritten by ``plan``."""
        resolved = resolve(plan, self.analysis)
        return rewrite(self.captured.clone(), resolved, self.analysis)

    def _batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a copy of the inputs, which the model may change."""
        args, kwargs = pytree.tree_map_only(Tensor, copied, (self.args, self.kwargs))
        return args, kwargs

    def _take(self, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modules = network.history.plan.modules if network.history else None
        loss_of = self.loss
        if modules is not None:
            shape = self.analysis.prediction(modules).shape or ()
            target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=self.device)
            kwargs, loss_of = {**kwargs, TARGET: target}, itemgetter(1)
        value = loss_of(network(*args, **kwargs))
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss is {found}: give loss=, a function from output to scalar")
        torch.autograd.backward(value)

    def peak_bytes(self, network: Network) -> float:
        """Return the most that a step keeps at a time; infinity if memory runs out."""
        heads = (*network.fxlocal.parameters(), *network.fxlocal.buffers())
        batch = self._batch()
        inputs = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        try:
            if not self.on_gpu:
                with count_saved_bytes(self.model, *inputs, *heads) as peak:
                    self._take(network, *batch)
                return peak()
            self._take(network, *batch)  # workspaces are made
            network.zero_grad(set_to_none=True)
            batch = self._batch()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._take(network, *batch)
            return torch.cuda.max_memory_allocated(self.device) - before
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            network.zero_grad(set_to_none=True)

    def seconds(self, network: Network) -> float:
        """Return what a step takes."""
        batch = self._batch()
        start = clock(self.device)
        self._take(network, *batch)
        taken = clock(self.device) - start
        network.zero_grad(set_to_none=True)
        return taken

    def time_blocks(self, kinds: Sequence[str]) -> Times:
        """Measure the blocks, trained and in a prefix of those kinds that the model can have."""
        analysis, batch = self.analysis, (self.args, self.kwargs, self.device)
        starts = [block.start for block in analysis.blocks]
        with train_mode(self.captured):
            trained = time_blocks(self.captured, starts, *batch)
            prefixes = {}
            for kind in kinds if len(starts) > 1 else ():
                prefix = prefix_of(kind, analysis.boundaries[-1])
                try:
                    network = self.network(Plan(local=prefix))
                except PlanError:  # a rule that does not fit the model's layers
                    continue
                records = network.history.records if network.history else ()
                passes = {record.name for record in records if record.diff}
                if prefix.norm == "train" or "replace_norms" in passes:
                    prefixes[kind] = time_blocks(network, starts, *batch)
        return Times(trained, prefixes)
