"""Ranks of a data parallel run: threads, which start at once, or processes, which are real.

And a small network, its batches and its Plans, for both.
"""

import faulthandler
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Oja, Plan

RULES = {
    "hebbian": Hebbian(0.05),
    "relative": Hebbian(0.05, relative=True),
    "oja": Oja(0.05),
    "custom": Custom(lambda weight, pre, post, product: product(pre, post.tanh()), rate=0.05),
    "freeze": Freeze(),
}


def build(seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(step, size):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 4, 4, generator=generator, dtype=torch.float64)


def plan_of(rule, until="5", **options):
    return Plan(local=LocalPrefix(until, RULES.get(rule, rule)), **options)


LOCK = threading.RLock()  # capture patches torch: one rank at a time


def build_in_turn(make: Callable[..., Any], *args: Any) -> Any:
    """Return ``make(*args)`` once all ranks have made theirs."""
    with LOCK:
        made = make(*args)
    distributed.barrier()
    return made


def in_threads(function: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """Return ``function(rank, *args)`` of each rank, which is a thread with a group of its own."""
    if torch.__version__ < "2.14":
        pytest.skip("fake tensors end the process in some threads of torch before 2.14")
    pg = pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")
    store, found, failed = distributed.HashStore(), [None] * size, list[Any]()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    pg._install_threaded_pg()
    patches = pytest.MonkeyPatch()
    patches.setattr(DistributedDataParallel, "_inside_ddp_forward", _inside)
    patches.setattr(DistributedDataParallel, "_get_active_ddp_module", _active)

    def run(rank: int) -> None:
        distributed.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            found[rank] = function(rank, *args)
        except BaseException as error:
            failed.append(error)
            pg.ProcessLocalGroup.exception_handle(error)
        finally:
            distributed.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        pg.ProcessLocalGroup.reset()
    finally:
        patches.undo()
        pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failed:
        raise failed[0]
    return found


def in_processes(function: Callable[..., Any], folder: Any, *args: Any, size: int = 2) -> list[Any]:
    """Return ``function(rank, *args)`` of each rank, which is a process of the gloo backend.

    One that native code ends is started again, once, and a warning says so: in some 100 runs on
    torch 2.14.1 malloc has found its heap in disorder once, which valgrind cannot find again.
    """
    for store in (first := folder / "first", folder / "second"):
        try:
            multiprocessing.spawn(_run, (folder, store, size, function, args), nprocs=size)
            break
        except multiprocessing.ProcessExitedException as error:
            if error.exit_code >= 0 or store is not first:
                raise
            warnings.warn(f"started again: {error}", stacklevel=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(
    rank: int, folder: Any, store: Any, size: int, function: Callable[..., Any], args: Any
) -> None:
    faulthandler.enable()  # what ends a process without an error says where
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def run_ranks(script, folder, *arguments):
    """Run ``script FOLDER ARGUMENT...`` on two ranks; return what each saved as ``end_RANK.pt``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", script, str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{Path(__file__).parent.parent}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"end_{rank}.pt") for rank in (0, 1)]


_WRAPPER = threading.local()  # torch's is one for the process


@contextmanager
def _inside(wrapper: Any) -> Iterator[None]:
    _WRAPPER.one = wrapper
    yield
    _WRAPPER.one = None


def _active() -> Any:
    return getattr(_WRAPPER, "one", None)
