"""What ranks of a model parallel run send each other: batches of values, all of the same shapes.

The first batch says what they look like, in some milliseconds. A run on fakes would not know it
without being told as much: the batch's size, the target and the step's autocast are known where
they are used, and the parameters of other ranks' modules lie on the CPU.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from ..facts import TensorSpec
from ..ops.replay import ReplayBuffer
from .ranks import Group, ParallelError, Ranks, Work

__all__ = ["Receiver", "ReplayReceiver", "Sender", "Specs"]

FOREVER = timedelta(days=365)


def _spec(tensor: Tensor) -> TensorSpec:
    """Return what ``tensor`` looks like; the strides are those of a copy without gaps."""
    dense, dtype = torch.empty_like(tensor, device="meta"), str(tensor.dtype)[len("torch.") :]
    return TensorSpec(tuple(tensor.shape), dtype, tensor.device.type, dense.stride())


def _empty(spec: TensorSpec, device: torch.device) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=device)


class Specs:
    """What the values called ``names`` looked like in the first batch, as in all others.

    Attributes:
        first: the values by name, with a `TensorSpec` for each tensor.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.first: dict[str, Any] = {}

    def check(self, values: Mapping[str, Any]) -> list[tuple[Tensor, TensorSpec]]:
        """Return the tensors among the values, each with what it looked like at first.

        Raises:
            ValueError: if a value has another shape, dtype or structure.
        """
        tensors: list[tuple[Tensor, TensorSpec]] = []
        for name in self.names:
            now = pytree.tree_map_only(Tensor, _spec, values[name])
            first = self.first.setdefault(name, now)
            looks, looked = (  # strides and devices may differ
                pytree.tree_map_only(TensorSpec, lambda spec: f"{spec.dtype} {spec.shape}", specs)
                for specs in (now, first)
            )
            if looks != looked:
                seen, then = (", ".join(map(str, pytree.tree_leaves(x))) for x in (looks, looked))
                raise ValueError(
                    f"{name!r} is {seen}, and was {then} in the first batch: every batch must have "
                    "the same shapes, so leave out a smaller last one"
                )
            pairs = zip(pytree.tree_leaves(values[name]), pytree.tree_leaves(first), strict=True)
            tensors += [(leaf, spec) for leaf, spec in pairs if isinstance(spec, TensorSpec)]
        return tensors


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


class Sender:
    """Sends values called ``names`` to the `Receiver` of rank ``peer`` in the same group.

    It waits for nothing but the batch before to arrive.
    """

    def __init__(self, ranks: Ranks, group: Group, peer: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ranks, self._group, self._peer = ranks, group, peer
        self._wire, self._specs = ranks.wire(group), Specs(names)
        self._pending: list[tuple[Work, Tensor]] = []

    def send(self, values: Mapping[str, Any]) -> None:
        """Send the values called `names`: tensors, containers of them, or constants.

        Raises:
            ParallelError: if the peer is lost.
            ValueError: if a value looks otherwise than in the first batch.
        """
        is_first = not self._specs.first
        tensors = self._specs.check(values)
        self.flush()
        if is_first:
            with self._ranks.talking_to([self._peer]):
                distributed.send_object_list(
                    [self._specs.first], self._peer, group=self._group, device=self._wire
                )
        for tensor, spec in tensors:
            self._isend(self._placed(tensor, spec))

    def announce(self, more: bool) -> None:
        """Say whether another batch follows."""
        self.flush()
        self._isend(torch.tensor([more], dtype=torch.int64))

    def flush(self) -> None:
        """Wait until all that was sent has arrived, and forget it; or a ParallelError."""
        for work, _ in self._pending:
            self._ranks.wait(work, [self._peer], self._wire)
        self._pending.clear()

    def _isend(self, tensor: Tensor) -> None:
        with self._ranks.talking_to([self._peer]):
            work = distributed.isend(_flat(tensor), self._peer, group=self._group)
        self._pending.append((work, tensor))

    def _placed(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        if tensor.device == self._wire and tensor.stride() == spec.stride:
            return tensor.detach()
        return _empty(spec, self._wire).copy_(tensor.detach())


class Receiver:
    """Takes what the `Sender` of rank ``peer`` sends, within ``timeout``; default: the run's.

    With ``ahead`` it asks for the next batch when one is taken, so that it arrives during the step;
    not on the GPU, whose stream would wait for it.
    """

    def __init__(
        self,
        ranks: Ranks,
        group: Group,
        peer: int,
        *,
        timeout: timedelta | None = None,
        ahead: bool = False,
    ) -> None:
        self._ranks, self._group, self._peer, self._timeout = ranks, group, peer, timeout
        self._wire = ranks.wire(group)
        self._ahead = ahead and self._wire.type == "cpu"
        self._specs: dict[str, Any] = {}
        self._asked: list[tuple[Work, Tensor]] = []

    def take(self) -> dict[str, Any]:
        """Return the next batch: its values by name; a ParallelError if the peer is lost."""
        if not self._specs:
            specs: list[Any] = [None]
            with self._ranks.talking_to([self._peer]):
                distributed.recv_object_list(
                    specs, self._peer, group=self._group, device=self._wire
                )
            (self._specs,) = specs
        asked = iter(self._asked or self._ask())
        batch: dict[str, Any] = pytree.tree_map_only(
            TensorSpec, lambda spec: self._wait(*next(asked), spec), self._specs
        )
        self._asked = self._ask() if self._ahead else []
        return batch

    def has_more(self) -> bool:
        """Wait for what `Sender.announce` says."""
        flag = torch.zeros(1, dtype=torch.int64)
        self._ranks.wait(self._irecv(flag), [self._peer], self._wire, self._timeout)
        return bool(flag)

    def _ask(self) -> list[tuple[Work, Tensor]]:
        leaves = pytree.tree_leaves(self._specs)
        buffers = [_empty(spec, self._wire) for spec in leaves if isinstance(spec, TensorSpec)]
        return [(self._irecv(buffer), buffer) for buffer in buffers]

    def _irecv(self, buffer: Tensor) -> Work:
        with self._ranks.talking_to([self._peer]):
            return distributed.irecv(_flat(buffer), self._peer, group=self._group)

    def _wait(self, work: Work, buffer: Tensor, spec: TensorSpec) -> Tensor:
        self._ranks.wait(work, [self._peer], self._wire, self._timeout)
        return buffer.to("cpu" if spec.device == "cpu" else self._ranks.device)


class ReplayReceiver:
    """A replay buffer that a thread fills with what rank ``peer`` sends, and announces.

    Batches that wait to be used for the first time fill it up; the sender is then not listened to
    until one is taken.
    """

    def __init__(self, ranks: Ranks, group: Group, peer: int, size: int) -> None:
        self._ranks, self._peer = ranks, peer
        self._receiver = Receiver(ranks, group, peer, timeout=FOREVER)
        self._buffer = ReplayBuffer(size)
        self._changed = threading.Condition()
        self._accepts_all = self._ended = False
        self._error: ParallelError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> dict[str, Any]:
        """Return the batch used least, or a failed sender's error; wait for the first one only."""
        with self._changed:
            with self._ranks.talking_to([self._peer]):
                begun = self._buffer.batches
                self._changed.wait_for(lambda: begun() or self._ended, self._ranks.timeout)
                if not begun() and self._error is None:
                    raise RuntimeError("no batch")
            if self._error:
                raise self._error
            (batch,) = self._buffer.take()
            self._changed.notify_all()
        return dict(batch)

    @contextmanager
    def accepting_all(self) -> Iterator[None]:
        """Let nobody wait: what is too much drives out the oldest."""
        before = self._accepts_all
        self._accept_all(True)
        yield
        self._accept_all(before)

    def join(self) -> None:
        """Wait until the sender has ended; a ParallelError if it does not, or failed."""
        with self._ranks.talking_to([self._peer]):
            self._thread.join(self._ranks.timeout)
            if self._thread.is_alive():
                raise RuntimeError("the sender goes on")
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            with self._ranks.reporting():
                while self._receiver.has_more():
                    self._keep(self._receiver.take())
        except ParallelError as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _keep(self, batch: dict[str, Any]) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._accepts_all or self._buffer.num_unused < self._buffer.size
            )
            self._buffer.put(batch)
            self._changed.notify_all()

    def _accept_all(self, whether: bool) -> None:
        with self._changed:
            self._accepts_all = whether
            self._changed.notify_all()
