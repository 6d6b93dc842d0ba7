"""Start the ranks of a run as torchrun does, hear from them, and start them again if one fails.

torchrun's agent gives each rank its environment (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``), keeps
the process group's store, watches over the processes and ends all of them with the first that
fails, whose error torch writes down for it. Here it runs in the process that starts the run, and
talks on the loopback alone.
"""

import logging
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import active_children, get_all_start_methods, get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ...errors import CaptureError, CheckpointError, PlanError
from ...ops.ranks import pack, unpack
from ...parallel import ParallelError
from ...parallel.ranks import name_rank
from ..data.catalogue import DataError, FileError
from ..stopping import end_with_parent
from .settings import Machine, SettingsError

__all__ = [
    "EVALUATION",
    "TIMEOUT",
    "LostRankError",
    "join_group",
    "launch",
    "naming_rank",
    "pack",
    "times_restarted",
    "unpack",
]

HOST = "127.0.0.1"
INTERVAL = 0.1  # seconds between looks at the processes
EVALUATION = timedelta(days=1)  # for which other ranks wait
# A rank that is killed is noticed at once; this, in seconds, ends one that hangs. A step may take
# long.
TIMEOUT = 600.0
GRACE = 5.0  # seconds within which all that lost another rank say so
LOST = re.compile("gloo/|NCCL|[Cc]onnection (was )?(closed|reset)|Broken pipe|Timed out waiting")
MISTAKES = {  # of the user's, by the name under which a rank's error is written down
    kind.__name__: kind
    for kind in (CaptureError, CheckpointError, DataError, FileError, PlanError, SettingsError)
}

Entry: TypeAlias = Callable[[int, bytes, Any], Any]


class LostRankError(ParallelError):
    """Another rank is gone, or does not answer; this one is not to blame."""


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
        num_modules: local modules that they run; rank r has module ``r % num_modules``. Or 0.
        events: what to call here, with the values, when rank 0 says something of this kind.
        max_restarts: how often to start all ranks again when one fails.

    Returns:
        What ``entry`` returned, by rank.

    Raises:
        ParallelError: if a rank failed once more; or a mistake of the user's, if that is why.
    """
    # Without handlers of torch's, which would stay, Ctrl-C raises here what it always does, and the
    # agent ends the ranks; the system does if this process is killed.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    address = {"endpoint": f"{HOST}:0", "local_addr": HOST, "run_id": "fxlocal"}
    rendezvous = get_rendezvous_handler(
        RendezvousParameters("c10d", min_nodes=1, max_nodes=1, **address)
    )
    with tempfile.TemporaryDirectory() as folder, _no_logs(), _no_orphans():
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
            result = _Agent(spec, events or {}, num_modules).run()
        finally:
            rendezvous.shutdown()
    if result.is_failed():
        failed = ChildFailedError(entry.__qualname__, result.failures)
        raise _error(*failed.get_first_failure(), num_modules, len(payloads)) from failed
    return [result.return_values[rank] for rank in range(len(payloads))]


class _Agent(LocalElasticAgent):
    """Passes on what rank 0 says, as often as it looks whether all is well, and who failed first.

    torch takes a rank that ends with 0 for one that goes on, and of several that failed the one of
    the lowest rank, which may only have lost the one that failed.

    Args:
        spec: of the ranks; they get the end of a pipe as one more argument.
        events: what to call when rank 0 says something.
        num_modules: by which ranks are named.
    """

    def __init__(
        self, spec: WorkerSpec, events: Mapping[str, Callable[..., object]], num_modules: int
    ) -> None:
        self._num_modules = num_modules
        forks = "forkserver" in get_all_start_methods()  # imports once; fork does not suit CUDA
        entry, folder = spec.args
        self._events, self._context = events, get_context("forkserver" if forks else "spawn")
        if forks:
            first = f"{__name__.split('.training')[0]}.forking"
            self._context.set_forkserver_preload([first, __name__, entry.__module__])
        method = self._context.get_start_method()
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder), start_method=method)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pipe, theirs = self._context.Pipe(duplex=False)
        worker_group.spec.args = (*worker_group.spec.args[:2], theirs)
        with theirs:  # closed here, so that the pipe ends with the ranks
            started: dict[int, Any] = super()._start_workers(worker_group)
        context: Any = self._pcontext
        context._worker_finished_event = _SetAside(context._worker_finished_event)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        culprit = self._find_culprit()
        result: RunResult = super()._monitor_workers(worker_group)
        if culprit is not None:
            failures = {culprit.local_rank: culprit}
            result = RunResult(state=WorkerState.FAILED, failures=failures)
        with suppress(EOFError):
            while self._pipe.poll():
                kind, *values = self._pipe.recv()
                self._events[kind](*values)
        return result

    def _find_culprit(self) -> ProcessFailure | None:
        """Return why the ranks fail, if one has ended; those that are done wait for the others."""
        context: Any = self._pcontext
        processes, deadline = context._pc.processes, time.monotonic() + GRACE
        while True:
            ended = [
                ProcessFailure(rank, process.pid, process.exitcode, context.error_files[rank])
                for rank, process in enumerate(processes)
                if process.exitcode is not None
            ]
            ended.sort(key=lambda failure: failure.exitcode == 1)  # which a lost connection is too
            if not ended or not all(map(_has_lost_another, ended)):
                return next((f for f in ended if not _has_lost_another(f)), None)
            if len(ended) == len(processes):
                return ended[0]
            if time.monotonic() > deadline:
                return self._give_up(next(r for r, p in enumerate(processes) if p.is_alive()))
            time.sleep(INTERVAL)

    def _give_up(self, rank: int) -> ProcessFailure:
        """Kill the rank that others have waited for."""
        context: Any = self._pcontext
        process = context._pc.processes[rank]
        process.kill()  # it may be stopped, and hear nothing else
        process.join()
        failure = ProcessFailure(rank, process.pid, process.exitcode, context.error_files[rank])
        count, size = self._num_modules, self._worker_group.spec.local_world_size
        name = name_rank(rank, count, size // max(count, 1))
        said: Any = {"message": f"{name} did not answer in time"}
        failure.message = said
        return failure


class _SetAside:
    """An event of processes, of which one may be gone: whoever sets it doesn't wait for all."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def set(self) -> None:
        threading.Thread(target=self._event.set, daemon=True).start()


def _has_lost_another(failure: ProcessFailure) -> bool:
    said: Any = failure.message
    if isinstance(said, dict):
        return str(said["message"]).startswith(LostRankError.__name__)
    return bool(failure.exitcode == -signal.SIGABRT)  # by nccl's watchdog


def _enter(entry: Entry, folder: str, pipe: Any) -> Any:
    """Run ``entry`` on a rank; torch writes down what it raises."""
    rank = int(os.environ["RANK"])
    end_with_parent()  # from which it is forked, and which does so too
    try:
        result = entry(rank, Path(folder, str(rank)).read_bytes(), pipe)
    except Exception as error:
        own = error.__cause__ if isinstance(error, ParallelError) else error
        is_lost = own is None or type(own) is RuntimeError  # the connection to another one
        if not is_lost and not isinstance(own, (LostRankError, *MISTAKES.values())):
            traceback.print_exc()  # a mistake of the program's
        raise
    distributed.destroy_process_group()
    return result


def _error(rank: int, failure: ProcessFailure, num_modules: int, size: int) -> Exception:
    """Return why a rank failed: what it raised, or that it was killed."""
    message: Any = failure.message
    if isinstance(message, str):  # it could not say why
        name = name_rank(rank, num_modules, size // max(num_modules, 1))
        reason = failure.signal_name() if failure.exitcode < 0 else f"code {failure.exitcode}"
        return ParallelError(f"{name} ended or did not answer: it ended with {reason}")
    text = re.sub("^(ParallelError|LostRankError): ", "", message["message"])
    mistake = re.fullmatch(
        rf"(?:rank \d+(?: \([^)]*\))?: )?({'|'.join(MISTAKES)}): (.*)", text, re.S
    )
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


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Kill what torch's agent does not know yet, if a signal comes while it starts the ranks."""
    before = active_children()
    try:
        yield
    except BaseException:
        for process in active_children():
            if process not in before:
                process.kill()
        raise


@contextmanager
def naming_rank() -> Iterator[None]:
    """Raise what goes wrong as a ParallelError that names this rank, or that it lost another."""
    try:
        yield
    except ParallelError:
        raise
    except Exception as error:
        reason = f"rank {os.environ['RANK']}: {type(error).__name__}: {error}"
        is_lost = isinstance(error, distributed.DistError) or type(error) is RuntimeError
        if is_lost and LOST.search(str(error)):
            raise LostRankError(f"{reason.splitlines()[0]} (another rank is gone)") from error
        raise ParallelError(reason) from error


def join_group(machine: Machine, timeout: timedelta = EVALUATION) -> Machine:
    """Join the process group of all ranks; return ``machine`` with this rank's own GPU.

    The group has nccl if each rank has a GPU to itself, else gloo alone.
    """
    rank, size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "gloo"
    here = int(os.environ.get("LOCAL_RANK", rank))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if machine.device.startswith("cuda"):
        num_gpus = torch.cuda.device_count()
        machine = replace(machine, device=f"cuda:{here % num_gpus}")
        torch.cuda.set_device(machine.device)
        backend = "cpu:gloo,cuda:nccl" if num_gpus >= beside else "gloo"
    options: dict[str, Any] = {"timeout": timeout}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent keeps one store for all attempts, with the addresses of ranks that have ended.
        kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = PrefixStore(f"attempt_{times_restarted()}", kept)
        options |= {"store": store, "rank": rank, "world_size": size}
    distributed.init_process_group(backend, **options)
    return machine


def times_restarted() -> int:
    """Return how often the ranks of this run have been started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
