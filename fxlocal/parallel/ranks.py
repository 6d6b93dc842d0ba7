"""The ranks of a model parallel run: who is who, what they share, and how they fail.

A rank that fails writes why into the process group's store. Whoever waits for it is told by the
backend that it is gone, or by the clock, looks there, and raises the same message. (torchrun keeps
the store in a process of its own. Where rank 0 does and dies, others can only name the rank that
they lost.)
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch import distributed

__all__ = ["Group", "ParallelError", "Ranks", "Work", "name_rank"]

Group: TypeAlias = Any  # a ProcessGroup; torch is built without it on some systems
Work: TypeAlias = Any

# Seconds between looks at a device's work, at who has come to a barrier, and at whether something
# failed; and between two heartbeats.
POLL, BARRIER_POLL, LOOK, HEARTBEAT = 2e-4, 5e-3, 1.0, 1.0

_runs = itertools.count()  # all ranks count alike, so that a run finds its own failures only


class ParallelError(RuntimeError):
    """A rank of a model parallel run failed, and so the run; all ranks raise this message."""


class Ranks:
    """Who runs what, and why the run failed if it did.

    Rank r runs module ``r % count`` for replica ``r // count``; the number of modules, ``count``,
    divides that of the ranks. It is 0 without modules. ``timeout`` is in seconds.
    """

    def __init__(self, count: int, device: torch.device, timeout: float) -> None:
        self.count, self.device, self.timeout = count, device, timeout
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        parts = max(count, 1)
        self.module, self.replica = self.rank % parts, self.rank // parts
        self.num_replicas = self.size // parts
        self._store = distributed.distributed_c10d._get_default_store()
        self._key = f"fxlocal/run_{next(_runs)}"
        self._num_barriers, self._last_heartbeat = 0, 0.0
        self.everyone = self.new_group(range(self.size))

    def new_group(self, ranks: Iterable[int], **options: Any) -> Group:
        """Make a group; every rank has to call this, for the same groups in the same order."""
        with self.talking_to(self.others):
            return distributed.new_group(list(ranks), **{"timeout": self._patience, **options})

    def wire(self, group: Group) -> torch.device:
        """Return the device that tensors have to be on to be sent in ``group``."""
        backends = distributed.get_backend_config(group)
        return self.device if f"{self.device.type}:nccl" in backends else torch.device("cpu")

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def rank_of(self, module: int) -> int:
        """Return the rank that runs ``module`` for this rank's replica."""
        return self.replica * self.count + module

    def wait(
        self, work: Work, peers: Sequence[int], wire: torch.device, timeout: timedelta | None = None
    ) -> None:
        """Wait for a message from or to ``peers``; on a GPU, let its stream wait too.

        Raises:
            ParallelError: if one failed, ended, or does not answer within the timeout.
        """
        with self.talking_to(peers):
            if wire.type == "cuda":
                self._poll(work)
            work.wait(timeout or self._patience)

    def heartbeat(self) -> None:
        """Let those that wait at a `barrier` know that this rank goes on."""
        if time.monotonic() - self._last_heartbeat > HEARTBEAT:
            with self.talking_to(self.others):
                self._store.add(f"{self._key}/heartbeats", 1)
            self._last_heartbeat = time.monotonic()

    def barrier(self) -> None:
        """Wait until all ranks are here, as long as one of them goes on.

        Not `torch.distributed.monitored_barrier`: of a rank that is missing only rank 0 is told
        there, others wait until that one ends too, and slow ranks cannot say that they go on.

        Raises:
            ParallelError: if a rank fails, or none that is missing goes on within the timeout.
        """
        self._num_barriers += 1
        here = f"{self._key}/barrier_{self._num_barriers}"
        missing, heartbeats, since = self.others, 0, time.monotonic()
        with self.talking_to(missing):
            self._store.set(f"{here}/{self.rank}", "here")
        while missing:
            with self.talking_to(missing):
                now_heartbeats = self._store.add(f"{self._key}/heartbeats", 0)
                if now_heartbeats > heartbeats:
                    heartbeats, since = now_heartbeats, time.monotonic()
                if self._reason() or time.monotonic() - since > self.timeout:
                    raise RuntimeError("ranks are missing")
                missing = [r for r in missing if not self._store.check([f"{here}/{r}"])]
            time.sleep(BARRIER_POLL)

    @contextmanager
    def talking_to(self, peers: Sequence[int]) -> Iterator[None]:
        """Say what became of ``peers`` where the backend finds that a connection is lost."""
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # which all backends raise
            late = time.monotonic() - begun > 0.9 * self.timeout
            raise ParallelError(self._find_reason(peers, late)) from error

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Let all ranks know what goes wrong on this one, by a ParallelError with that message."""
        try:
            yield
        except ParallelError:
            raise
        except Exception as error:
            reason = f"{self._name(self.rank)}: {type(error).__name__}: {error}"
            raise ParallelError(self._publish(reason)) from error

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self.timeout)

    def _poll(self, work: Work) -> None:
        """Wait for a device's work, which would not be noticed to fail."""
        begun = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - begun > self.timeout or (now - looked > LOOK and self._reason()):
                raise RuntimeError("the device's work did not end")
            looked = now if now - looked > LOOK else looked
            time.sleep(POLL)

    def _find_reason(self, peers: Sequence[int], late: bool) -> str:
        if reason := self._reason():
            return reason
        if late and len(peers) == 1:
            peers = [self._find_silent(peers[0])]
        names = " or ".join(map(self._name, peers))
        return self._publish(f"{names} ended or did not answer within {self.timeout:g} s")

    def _find_silent(self, peer: int) -> int:
        """Return the rank that ``peer`` waits for in its turn, or the one that this one does."""
        with suppress(RuntimeError):
            self._store.set(f"{self._key}/{self.rank}", str(peer))
            time.sleep(LOOK)  # others' clocks run out about now as well
            for _ in range(self.size):
                if not self._store.check([f"{self._key}/{peer}"]):
                    break
                peer = int(self._store.get(f"{self._key}/{peer}"))
        return peer

    def _reason(self) -> str:
        with suppress(RuntimeError):  # the rank that keeps the store is gone
            if self._store.check([self._key]):
                return str(self._store.get(self._key), "utf-8")
        return ""

    def _publish(self, reason: str) -> str:
        """Write the reason down, and return the one that was first."""
        with suppress(RuntimeError):
            return str(self._store.compare_set(self._key, "", reason), "utf-8")
        return reason

    def _name(self, rank: int) -> str:
        return name_rank(rank, self.count, self.num_replicas)


def name_rank(rank: int, count: int, num_replicas: int) -> str:
    """Return how a rank is called where ``count`` modules, or 0, have ``num_replicas`` of each."""
    if not count:
        return f"rank {rank}"
    replica = f", replica {rank // count}" if num_replicas > 1 else ""
    return f"rank {rank} (module {rank % count}{replica})"
