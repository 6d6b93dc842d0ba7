"""Train a network with local modules on several processes, one per module (BackLink, section 4.2).

A rank sends what later modules take from it before it back-propagates, and waits for no one's
backward; so modules work on different batches at the same time. What two modules share (the layers
of a link) both keep, and both get the sum of their gradients, in one message: equal gradients and
equal optimizers make equal steps. The weights are those of one process, but for random numbers:
each rank draws its own.

With replay buffers (DGL) a module takes a batch again instead of waiting for the next one; a module
more than ``replay`` batches ahead of the next one waits for it, so that no batch is lost.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from ..compiler.transform import transform
from ..errors import PlanError
from ..ir.nodes import FIXED
from ..ir.source import arguments
from ..ir.stages import Stage, find_stages
from ..ops.local_modules import backward
from ..plan import Freeze, LocalModules, Plan
from .messages import Receiver, ReplayReceiver, Sender, Specs
from .ranks import ParallelError, Ranks
from .sharing import find_sums, gather, spread, tensors_of

__all__ = ["ModelParallel", "ParallelError"]


class ModelParallel:
    """One rank's part of a network with local modules.

    Every rank makes it from the same model and Plan, after
    ``torch.distributed.init_process_group``; the weights become those of rank 0. With R times as
    many ranks as modules, rank r runs module ``r % count`` of replica ``r // count``: each replica
    has batches of its own, over which gradients are averaged.

    Tensors cross by nccl where the model is on a GPU and the process group has it, else by way of
    the CPU, as all do with replay buffers.

    Args:
        model: on the device of this rank; only this module's parameters stay there.
        plan: with ``modules``.
        example_inputs: one batch of the model's inputs.
        example_inputs_by_name: those of them that are given by keyword.
        timeout: seconds after which a rank that does not answer ends the run. If one rank is to do
            something that takes longer, such as evaluating, let the others wait for it in a
            collective of `torch.distributed`.

    Attributes:
        network: the whole, as `fxlocal.transform` returns it; of its parameters only those of this
            rank are trained here. For `fxlocal.scale_losses`, which scales the last loss here too.
        stage: this rank's part.

    Raises:
        PlanError: if the Plan has no modules, or not as many as there are ranks, or their
            multiple; or if it does not fit the model.
        RuntimeError: if there is no process group.

    Example:
        On each of two processes, which ``torchrun --nproc-per-node 2`` starts::

            torch.distributed.init_process_group("gloo")
            plan = Plan(modules=LocalModules(2, link=1, num_classes=10))
            with ModelParallel(model, plan, x) as part:
                optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
                for x, target in batches:  # read on the rank of module 0
                    loss = part.step(x, target)
                    optimizer.step()
                    optimizer.zero_grad()
                state = part.gather_state()
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *example_inputs: Any,
        timeout: float = 60.0,
        **example_inputs_by_name: Any,
    ) -> None:
        modules = _checked(plan)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        make = partial(transform, model, plan, *example_inputs, **example_inputs_by_name)
        self.network = make(process_group=_replicas(plan, modules.count))
        self.network.train()
        stages = find_stages(self.network)
        used = [tensors_of(self.network, stage) for stage in stages]
        self.ranks = ranks = Ranks(modules.count, device, timeout)
        self.stage = stages[ranks.module]
        self._owners = {
            name: next((k for k, ids in enumerate(used) if id(tensor) in ids), 0)
            for name, tensor in self.network.state_dict(keep_vars=True).items()
        }
        group = ranks.new_group(range(ranks.size), backend="gloo" if modules.replay else None)
        inputs = self.network.graph.find_nodes(op="placeholder")
        self._inputs = [str(node.target) for node in inputs if FIXED not in node.meta]
        self._specs = Specs(self._inputs)
        routes = _find_routes(stages, self._inputs)
        self._senders = [
            Sender(ranks, group, ranks.rank_of(taker), names)
            for (maker, taker), names in routes.items()
            if maker == ranks.module
        ]
        makers = [ranks.rank_of(m) for m, taker in routes if taker == ranks.module]
        self._replays, self._replay_receiver = bool(modules.replay), None
        self._receivers = []
        if self._replays and makers:
            (peer,) = makers  # all that a stage takes has come through the buffer before it
            self._replay_receiver = ReplayReceiver(ranks, group, peer, modules.replay)
        else:
            self._receivers = [Receiver(ranks, group, peer, ahead=True) for peer in makers]
        self._sums = list(find_sums(self.network, used, ranks))
        with ranks.reporting():
            spread(self.network.state_dict(), self.ranks)
        for parameter in self.network.parameters():
            if id(parameter) not in used[ranks.module]:
                parameter.data = parameter.data.cpu()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that this rank trains: its module's and its head's.

        Those that a link shares are among them, and are trained by both ranks alike. So a rule
        that depends on other parameters too, such as the clipping of a total norm, parts them.
        """
        return iter(dict.fromkeys(self.stage.parameters.values()))

    def step(self, *inputs: Any, **inputs_by_name: Any) -> Tensor | None:
        """Run this rank's module on a batch, forward and backward; ``.grad`` adds up as usual.

        Args:
            inputs: the model's inputs and the target, on the rank of module 0; others get theirs
                from there, and what they are given is left alone.
            inputs_by_name: those of them that are given by keyword.

        Returns:
            This module's loss, detached; None if nothing in it learns.

        Raises:
            ParallelError: if this or another rank fails, with the same message on all.
        """
        with self.ranks.reporting():
            self.ranks.heartbeat()
            values = self._receive(inputs, inputs_by_name)
            made, (_, loss) = self.stage(*(values[name] for name in self.stage.inputs))
            values.update(zip(self.stage.outputs, made, strict=True))
            for sender in self._senders:
                if self._replays:
                    sender.announce(more=True)
                sender.send(values)
            self._back_propagate(loss)
        return None if loss is None else loss.detach()

    def synchronize(self) -> None:
        """Wait until all ranks have come here, and all that was sent has arrived.

        Raises:
            ParallelError: if a rank fails.
        """
        with self.ranks.reporting(), self._accepting_all():
            for sender in self._senders:
                sender.flush()
            self.ranks.barrier()

    def gather_state(self) -> dict[str, Tensor] | None:
        """Return the whole network's ``state_dict`` on rank 0, copied to the CPU; None elsewhere.

        All ranks have to call it. Of replicas, the first one's buffers are taken.

        Raises:
            ParallelError: if a rank fails.
        """
        ranks = self.ranks
        self.synchronize()
        own = {
            name: value
            for name, value in self.network.state_dict().items()
            if ranks.replica == 0 and self._owners[name] == ranks.module
        }
        with ranks.reporting():
            parts = gather(own, ranks)
        whole = {name: value for part in parts for name, value in part.items()}
        return {name: whole[name] for name in self.network.state_dict()} if parts else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up what `gather_state` returned; all ranks have to call it.

        Args:
            state: on rank 0; other ranks' is not looked at.

        Raises:
            ParallelError: if it does not fit, or a rank fails.
        """
        with self.ranks.reporting():
            if self.ranks.rank == 0:
                self.network.load_state_dict(state or {})
            spread(self.network.state_dict(), self.ranks)

    def close(self) -> None:
        """End all ranks' parts; all have to call it.

        Raises:
            ParallelError: if a rank fails.
        """
        with self.ranks.reporting(), self._accepting_all():
            self.synchronize()
            for sender in self._senders if self._replays else ():
                sender.announce(more=False)
                sender.flush()
            if self._replay_receiver:
                self._replay_receiver.join()

    def __enter__(self) -> "ModelParallel":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            with self.ranks.reporting():
                raise error

    def _receive(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by name that this rank's module takes."""
        if self.ranks.module == 0:
            try:
                batch = arguments(self.network.graph, inputs, named)
            except TypeError as error:
                raise ValueError(
                    f"step() got {len(inputs) + len(named)} values: module 0 takes "
                    f"{', '.join(self._inputs)}"
                ) from error
            batch = {name: batch[name] for name in self._inputs}
            self._specs.check(batch)
            for name in {name for sender in self._senders for name in sender.names} & set(batch):
                # The caller may overwrite it before it has arrived.
                batch[name] = pytree.tree_map_only(Tensor, Tensor.clone, batch[name])
            return batch
        if self._replay_receiver:
            return self._replay_receiver.take()
        return {name: v for receiver in self._receivers for name, v in receiver.take().items()}

    def _accepting_all(self) -> AbstractContextManager[None]:
        """Take in all that comes, so that no rank waits for this one's next step."""
        return self._replay_receiver.accepting_all() if self._replay_receiver else nullcontext()

    def _back_propagate(self, loss: Tensor | None) -> None:
        """Add the gradients of ``loss``, and others' of what is shared, to ``.grad``."""
        shared = [p for group in self._sums for p in group.parameters]
        before = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = None
        if loss is not None:
            assert self.network.fxlocal.loss_scale is not None
            backward(loss, self.network.fxlocal.loss_scale)
        begun = [(group, *group.begin()) for group in self._sums]
        for group, work, flat in begun:
            group.end(work, flat)
        for parameter, gradient in zip(shared, before, strict=True):
            if gradient is not None:
                added = parameter.grad
                parameter.grad = gradient if added is None else gradient.add_(added)


def _replicas(plan: Plan, count: int) -> Any:
    """Return the group of this rank's replicas, which sum what a prefix learns."""
    if plan.local is None or isinstance(plan.local.rule, Freeze):
        return None
    size, rank = distributed.get_world_size(), distributed.get_rank()
    groups = [distributed.new_group(list(range(k, size, count))) for k in range(count)]  # by all
    return groups[rank % count]


def _checked(plan: Plan) -> LocalModules:
    """Return the plan's modules, if there are processes for them."""
    modules = plan.modules
    if modules is None or modules.count == 1:
        raise PlanError(
            f"{plan!r}: model parallel training needs two modules or more, each for a process: "
            "Plan(modules=LocalModules(2, ...))"
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "ModelParallel without a process group: start the script with torchrun "
            f"--nproc-per-node {modules.count}, and call torch.distributed.init_process_group() "
            "first"
        )
    size = distributed.get_world_size()
    if size % modules.count:
        raise PlanError(
            f"{modules!r}: {modules.count} modules cannot be shared out to {size} processes: start "
            f"{modules.count}, or a multiple for as many replicas"
        )
    return modules


def _find_routes(
    stages: Sequence[Stage], inputs: Sequence[str]
) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return which values go from one module to another, in the order in which all send."""
    makers = {name: stage.index for stage in stages for name in stage.outputs}
    makers |= dict.fromkeys(inputs, 0)
    routes: dict[tuple[int, int], tuple[str, ...]] = {}
    for stage in stages[1:]:
        for name in stage.inputs:
            route = makers[name], stage.index
            routes[route] = (*routes.get(route, ()), name)
    return dict(sorted(routes.items()))
