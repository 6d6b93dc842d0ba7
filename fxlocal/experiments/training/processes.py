"""Start the ranks of a run as torchrun does, hear from them, and start them again if one fails.

torchrun's agent gives each rank its environment (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``), keeps
the process group's store, watches over the processes and ends all of them with the first that
fails, whose error torch writes down for it. Here it runs in the process that starts the run, and
talks on the loopback alone.
"""

import io
import logging
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ...errors import CaptureError, CheckpointError, PlanError
from ...parallel import ParallelError
from ...parallel.ranks import name_rank
from ..data.catalogue import DataError, FileError
from .settings import Machine, SettingsError

__all__ = ["join_group", "launch", "pack", "times_restarted", "unpack"]

HOST = "127.0.0.1"
INTERVAL = 0.1  # seconds between looks at the processes
EVALUATION = timedelta(days=1)  # for which other ranks wait
MISTAKES = {  # of the user's, by the name under which a rank's error is written down
    kind.__name__: kind
    for kind in (CaptureError, CheckpointError, DataError, FileError, PlanError, SettingsError)
}

Entry: TypeAlias = Callable[[int, bytes, Any], Any]


def launch(
    entry: Entry,
    payloads: Sequence[bytes],
    num_modules: int,
    events: Mapping[str, Callable[..., object]] | None = None,
    *,
    max_restarts: int = 0,
) -> list[Any]:
    """Run a function on processes that `join_group` makes ranks of a process group.

    None of them goes on when this returns or raises, whatever it is.

    Args:
        entry: what each runs, given its rank, its payload, and a pipe on which rank 0 may say how
            it goes: (kind, *values). It is a function of a module, as are all that can be pickled.
        payloads: what the ranks are told, one for each.
        num_modules: local modules that they run; rank r has module ``r % num_modules``.
        events: what to call here, with the values, when rank 0 says something of this kind.
        max_restarts: how often to start all ranks again when one fails.

    Returns:
        What ``entry`` returned, by rank.

    Raises:
        ParallelError: if a rank failed once more; or a mistake of the user's, if that is why.
    """
    # Without handlers of torch's, which would stay, Ctrl-C raises here what it always does, and the
    # agent ends the ranks; they also end by themselves if this process is killed.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    address = {"endpoint": f"{HOST}:0", "local_addr": HOST, "run_id": "fxlocal"}
    rendezvous = get_rendezvous_handler(
        RendezvousParameters("c10d", min_nodes=1, max_nodes=1, **address)
    )
    with tempfile.TemporaryDirectory() as folder, _no_logs():
        for rank, payload in enumerate(payloads):  # a file each: torch gives all the same arguments
            Path(folder, str(rank)).write_bytes(payload)
        spec = WorkerSpec(
            "rank",
            len(payloads),
            rendezvous,
            entrypoint=_enter,
            args=(entry, folder),
            max_restarts=max_restarts,
            monitor_interval=INTERVAL,
            local_addr=HOST,
        )
        try:
            result = _Agent(spec, events or {}).run()
        finally:
            rendezvous.shutdown()
    if result.is_failed():
        failed = ChildFailedError(entry.__qualname__, result.failures)
        raise _error(*failed.get_first_failure(), num_modules, len(payloads)) from failed
    return [result.return_values[rank] for rank in range(len(payloads))]


class _Agent(LocalElasticAgent):
    """Passes on what rank 0 says, as often as it looks whether all is well.

    Args:
        spec: of the ranks; they get the end of a pipe as one more argument.
        events: what to call when rank 0 says something.
    """

    def __init__(self, spec: WorkerSpec, events: Mapping[str, Callable[..., object]]) -> None:
        forks = "forkserver" in get_all_start_methods()  # imports once; fork does not suit CUDA
        entry, folder = spec.args
        self._events, self._context = events, get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([__name__, entry.__module__])
        method = self._context.get_start_method()
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder), start_method=method)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pipe, theirs = self._context.Pipe(duplex=False)
        worker_group.spec.args = (*worker_group.spec.args[:2], theirs)
        with theirs:  # closed here, so that the pipe ends with the ranks
            started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        with suppress(EOFError):
            while self._pipe.poll():
                kind, *values = self._pipe.recv()
                self._events[kind](*values)
        return result


def _enter(entry: Entry, folder: str, pipe: Any) -> Any:
    """Run ``entry`` on a rank; torch writes down what it raises."""
    rank = int(os.environ["RANK"])
    try:
        result = entry(rank, Path(folder, str(rank)).read_bytes(), pipe)
    except Exception as error:
        own = error.__cause__ if isinstance(error, ParallelError) else error
        is_lost = own is None or type(own) is RuntimeError  # the connection to another one
        if not is_lost and not isinstance(own, tuple(MISTAKES.values())):
            traceback.print_exc()  # a mistake of the program's
        raise
    distributed.destroy_process_group()
    return result


def _error(rank: int, failure: ProcessFailure, num_modules: int, size: int) -> Exception:
    """Return why a rank failed: what it raised, or that it was killed."""
    message: Any = failure.message
    if isinstance(message, str):  # it could not say why
        name = name_rank(rank, num_modules, size // num_modules)
        reason = failure.signal_name() if failure.exitcode < 0 else f"code {failure.exitcode}"
        return ParallelError(f"{name} ended or did not answer: it ended with {reason}")
    text = message["message"].removeprefix("ParallelError: ")
    mistake = re.fullmatch(rf"(?:rank \d+ \([^)]*\): )?({'|'.join(MISTAKES)}): (.*)", text, re.S)
    return MISTAKES[mistake[1]](mistake[2]) if mistake else ParallelError(text)


@contextmanager
def _no_logs() -> Iterator[None]:
    """Let torch keep to itself what is raised as one error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def join_group(machine: Machine) -> Machine:
    """Join the process group of all ranks; return ``machine`` with this rank's own GPU.

    The group has nccl if each rank has a GPU to itself, else gloo alone.
    """
    rank, size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "gloo"
    if machine.device.startswith("cuda"):
        num_gpus = torch.cuda.device_count()
        machine = replace(machine, device=f"cuda:{rank % num_gpus}")
        torch.cuda.set_device(machine.device)
        backend = "cpu:gloo,cuda:nccl" if num_gpus >= size else "gloo"
    # The agent keeps one store for all attempts, with the addresses of ranks that have ended.
    kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = PrefixStore(f"attempt_{times_restarted()}", kept)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=EVALUATION
    )
    return machine


def times_restarted() -> int:
    """Return how often the ranks of this run have been started again."""
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def pack(value: Any) -> bytes:
    """Return ``value`` as bytes; pickling does not know all dtypes, and torch's own may share."""
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def unpack(packed: bytes) -> Any:
    """Return what `pack` packed."""
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
