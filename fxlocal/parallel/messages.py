"""What ranks of a model parallel run send each other: batches of values, all of the same shapes."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from ..ops.replay import ReplayBuffer
from .ranks import Group, ParallelError, Ranks, Work

__all__ = ["Arrivals", "Forms", "Inbox", "Outbox"]

FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class _Form:
    """What a tensor looks like, so that it can be sent without saying so each time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    on_device: bool

    def agrees(self, other: object) -> bool:
        return isinstance(other, _Form) and (self.shape, self.dtype) == (other.shape, other.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dense = torch.empty_like(value, device="meta")  # the strides of a copy without gaps
    return _Form(tuple(value.shape), value.dtype, dense.stride(), value.device.type != "cpu")


def _empty(form: _Form, device: torch.device) -> Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


class Forms:
    """What the values of the first batch looked like, which those of all others have to.

    Args:
        names: of the values.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.by_name: dict[str, tuple[list[Any], pytree.TreeSpec]] = {}

    def check(self, values: Mapping[str, Any]) -> list[tuple[Tensor, _Form]]:
        """Return the tensors among the values, each with what it looked like at first.

        Raises:
            ValueError: if a value has another shape, dtype or structure.
        """
        tensors: list[tuple[Tensor, _Form]] = []
        for name in self.names:
            leaves, tree = pytree.tree_flatten(values[name])
            forms = [_form(leaf) for leaf in leaves]
            first, first_tree = self.by_name.setdefault(name, (forms, tree))
            if tree != first_tree or not all(map(_agrees, forms, first)):
                now, then = (", ".join(map(str, some)) for some in (forms, first))
                raise ValueError(
                    f"{name!r} is {now}, and was {then} in the first batch: every batch must have "
                    "the same shapes, so leave out a smaller last one"
                )
            pairs = zip(leaves, first, strict=True)
            tensors += [(leaf, form) for leaf, form in pairs if isinstance(form, _Form)]
        return tensors


def _agrees(form: Any, first: Any) -> bool:
    return form.agrees(first) if isinstance(form, _Form) else bool(form == first)


class Outbox:
    """Sends batches of values to one rank, waiting for nothing but the batch before to arrive.

    Args:
        ranks: of this run.
        group: in which to send.
        peer: the rank that takes them, by an `Inbox` in the same group.
        names: of the values.
    """

    def __init__(self, ranks: Ranks, group: Group, peer: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ranks, self._group, self._peer = ranks, group, peer
        self._wire, self._forms = ranks.wire(group), Forms(names)
        self._pending: list[tuple[Work, Tensor]] = []

    def send(self, values: Mapping[str, Any]) -> None:
        """Send the values called `names`: tensors, containers of them, or constants.

        Raises:
            ParallelError: if the peer is lost.
            ValueError: if a value looks otherwise than in the first batch.
        """
        first = not self._forms.by_name
        tensors = self._forms.check(values)
        self.flush()
        if first:
            with self._ranks.talking_to([self._peer]):
                distributed.send_object_list(
                    [self._forms.by_name], self._peer, group=self._group, device=self._wire
                )
        for tensor, form in tensors:
            self._isend(self._placed(tensor, form))

    def announce(self, more: bool) -> None:
        """Say whether another batch follows."""
        self.flush()
        self._isend(torch.tensor([more], dtype=torch.int64))

    def flush(self) -> None:
        """Wait until all that was sent has arrived, and forget it.

        Raises:
            ParallelError: if the peer is lost.
        """
        for work, _ in self._pending:
            self._ranks.wait(work, [self._peer], self._wire)
        self._pending.clear()

    def _isend(self, tensor: Tensor) -> None:
        with self._ranks.talking_to([self._peer]):
            work = distributed.isend(_flat(tensor), self._peer, group=self._group)
        self._pending.append((work, tensor))

    def _placed(self, tensor: Tensor, form: _Form) -> Tensor:
        if tensor.device == self._wire and tensor.stride() == form.stride:
            return tensor.detach()
        return _empty(form, self._wire).copy_(tensor.detach())


class Inbox:
    """Takes what the `Outbox` of another rank sends.

    Args:
        ranks: of this run.
        group: in which it is sent.
        peer: the rank that sends.
        timeout: how long to wait for a batch; default: the run's.
        ahead: ask for the next batch when one is taken, so that it arrives during the step. Not on
            the GPU, whose stream would wait for it.
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
        self._forms: dict[str, tuple[list[Any], pytree.TreeSpec]] = {}
        self._asked: list[tuple[Work, Tensor]] = []

    def take(self) -> dict[str, Any]:
        """Return the next batch: its values by name.

        Raises:
            ParallelError: if the peer is lost.
        """
        if not self._forms:
            forms: list[Any] = [None]
            with self._ranks.talking_to([self._peer]):
                distributed.recv_object_list(
                    forms, self._peer, group=self._group, device=self._wire
                )
            (self._forms,) = forms
        asked = iter(self._asked or self._ask())
        batch = {}
        for name, (forms, tree) in self._forms.items():
            leaves = [self._wait(*next(asked), f) if isinstance(f, _Form) else f for f in forms]
            batch[name] = pytree.tree_unflatten(leaves, tree)
        self._asked = self._ask() if self._ahead else []
        return batch

    def has_more(self) -> bool:
        """Wait for what `Outbox.announce` says."""
        flag = torch.zeros(1, dtype=torch.int64)
        self._ranks.wait(self._irecv(flag), [self._peer], self._wire, self._timeout)
        return bool(flag)

    def _ask(self) -> list[tuple[Work, Tensor]]:
        forms = [f for forms, _ in self._forms.values() for f in forms if isinstance(f, _Form)]
        buffers = [_empty(form, self._wire) for form in forms]
        return [(self._irecv(buffer), buffer) for buffer in buffers]

    def _irecv(self, buffer: Tensor) -> Work:
        with self._ranks.talking_to([self._peer]):
            return distributed.irecv(_flat(buffer), self._peer, group=self._group)

    def _wait(self, work: Work, buffer: Tensor, form: _Form) -> Tensor:
        self._ranks.wait(work, [self._peer], self._wire, self._timeout)
        return buffer.to(self._ranks.device if form.on_device else "cpu")


class Arrivals:
    """A replay buffer that a thread fills with what another rank sends.

    Batches that wait to be used for the first time fill it up; the sender is then not listened to
    until one is taken.

    Args:
        ranks: of this run.
        group: in which they are sent.
        peer: the rank that sends, and announces each.
        size: of the buffer.
    """

    def __init__(self, ranks: Ranks, group: Group, peer: int, size: int) -> None:
        self._ranks, self._peer = ranks, peer
        self._inbox = Inbox(ranks, group, peer, timeout=FOREVER)
        self._buffer = ReplayBuffer(size)
        self._changed = threading.Condition()
        self._accepts_all = self._began = self._ended = False
        self._error: ParallelError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> dict[str, Any]:
        """Return the batch used least; wait for the first one only.

        Raises:
            ParallelError: if the sender failed.
        """
        with self._changed:
            with self._ranks.talking_to([self._peer]):
                self._changed.wait_for(lambda: self._began or self._ended, self._ranks.timeout)
                if not self._began and self._error is None:
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
        """Wait until the sender has ended.

        Raises:
            ParallelError: if it does not, or failed.
        """
        with self._ranks.talking_to([self._peer]):
            self._thread.join(self._ranks.timeout)
            if self._thread.is_alive():
                raise RuntimeError("the sender goes on")
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            with self._ranks.reporting():
                while self._inbox.has_more():
                    self._keep(self._inbox.take())
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
            self._began = True
            self._changed.notify_all()

    def _accept_all(self, whether: bool) -> None:
        with self._changed:
            self._accepts_all = whether
            self._changed.notify_all()
