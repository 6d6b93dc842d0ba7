"""Runs that are stopped or killed at random moments, and that go on exactly: ``python killing.py``.

Each kind of run is made once as a whole. Then it is begun again and again, broken off by a signal
after a random time, and gone on with by ``--resume`` until it ends: its numbers have to be the
whole run's to the bit, no process may be left, and no file may be torn.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

DATA = ["--data", "fake", "--num-train", "256", "--num-test", "64", "--size", "8"]
TINY = [*DATA, "--model", "resnet8", "--width", "4", "--batch-size", "16", "--threads", "1"]
SWEEP = ["sweep", "--strategy", "freeze", "--vary", "largest=0.4,0.6"]
KINDS = {
    "train": ["train", *TINY, "--epochs", "12", "--save-every", "5"],
    "compare": ["compare", *TINY, "--epochs", "4", "--strategies", "sgd,freeze", "--seeds", "0,1"],
    "sweep": [*SWEEP, *TINY, "--epochs", "4", "--seeds", "0"],
    "ranks": ["train", *TINY, "--epochs", "8", "--nproc", "2"],
}
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "Ctrl-C": signal.SIGINT}
TIMED = ("seconds", "images_per_second", "speedup", "on_front", "date", "command", "host")


def numbers_of(value):
    """What the runs came to, without times."""
    if isinstance(value, dict):
        return {
            name: numbers_of(own)
            for name, own in value.items()
            if not any(timed in name for timed in TIMED)
        }
    return [numbers_of(one) for one in value] if isinstance(value, list) else value


def begin(arguments, folder):
    """Start a command in a process group of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "fxlocal", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FXLOCAL_KILLING": str(folder)}
    # Where this script runs behind an ampersand, Ctrl-C is ignored by all that it starts.
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, **hears
        )


def left_over(folder):
    """The processes that were started for a folder and still run."""
    found, mark = [], f"FXLOCAL_KILLING={folder}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if mark in (entry / "environ").read_bytes().split(b"\0") and state != "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def await_none(folder, seconds=60.0):
    """Wait until no process of the folder's is left; return those that stay, and how long."""
    start = time.monotonic()
    while (rest := left_over(folder)) and time.monotonic() - start < seconds:
        time.sleep(0.05)
    return rest, time.monotonic() - start


def check_files(folder):
    """Read each file of the folder, as whoever goes on will."""
    from fxlocal.experiments.training.checkpoint import read_checkpoint

    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    if (folder / "checkpoint.pt").exists():
        read_checkpoint(folder / "checkpoint.pt")


def weights_of(folder):
    """The weights in a checkpoint."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    return state["driver"]["model"]


def results_of(folder):
    (path,) = [p for p in (folder / "results.json", folder / "sweep.json") if p.exists()]
    return numbers_of(json.loads(path.read_text()))


def kill_once(kind, name, whole, folder, seconds, rng):
    """Break a run off, once or twice, and go on; return what was wrong, and a line about it."""
    first, told, left = [*KINDS[kind], "--out", str(folder)], [], rng.choice((1, 1, 2))
    arguments = first
    shutil.rmtree(folder, ignore_errors=True)
    while left:
        after = rng.uniform(0.2, 0.9) * seconds
        process = begin(arguments, folder)
        try:
            process.wait(after)
            shutil.rmtree(folder)  # ended before the signal came
            arguments, seconds = first, 0.8 * seconds
            continue
        except subprocess.TimeoutExpired:
            send = os.killpg if name == "Ctrl-C" else os.kill
            send(process.pid, SIGNALS[name])
        left, code = left - 1, process.wait(120)
        rest, waited = await_none(folder)
        told.append(f"{after:.1f} s: code {code}, all gone {waited:.1f} s later")
        if rest:
            return f"{rest} go on", told
        if (folder / "job.json").exists():  # it had begun
            check_files(folder)
            arguments = [KINDS[kind][0], "--resume", str(folder)]
    process = begin(arguments, folder)
    if process.wait(600) != 0:
        return f"--resume ended with {process.returncode}: see {folder}.log", told
    rest, _ = await_none(folder)
    if rest:
        return f"{rest} go on", told
    check_files(folder)
    if torn := list(folder.glob("*.partial")):
        return f"{torn} are left", told
    if results_of(folder) != results_of(whole):
        return f"results of {folder} are not those of {whole}", told
    mine, theirs = weights_of(folder), weights_of(whole)
    if not all(torch.equal(mine[key], theirs[key]) for key in theirs):
        return f"weights of {folder} are not those of {whole}", told
    if kind != "sweep":  # which keeps no steps
        mine, theirs = (_lines(one) for one in (folder, whole))
        if mine != theirs:
            return f"metrics.jsonl has {mine} lines, not {theirs}", told
    return "", told


def _lines(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


def kill(kinds, count, folder, seed=0, names=tuple(SIGNALS)):
    """Kill runs of each kind by each signal, in any order; return how many went wrong."""
    rng, wrong, wholes = random.Random(seed), 0, {}
    pairs = list(itertools.product(kinds, names))
    rng.shuffle(pairs)
    for turn, (kind, name) in zip(range(count), itertools.cycle(pairs), strict=False):
        if kind not in wholes:
            whole, start = folder / f"whole-{kind}", time.monotonic()
            process = begin([*KINDS[kind], "--out", str(whole)], whole)
            if process.wait(600) != 0:
                raise RuntimeError(Path(f"{whole}.log").read_text())
            wholes[kind] = whole, time.monotonic() - start
        whole, seconds = wholes[kind]
        problem, told = kill_once(kind, name, whole, folder / f"{turn}-{kind}", seconds, rng)
        wrong += bool(problem)
        print(f"{turn} {kind} {name}: {'; '.join(told)}: {problem or 'exact'}", flush=True)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = Path(tempfile.mkdtemp())
    failures = kill(options.kinds.split(","), options.count, made, options.seed)
    print(f"{options.count} kills, {failures} wrong; {made}")
    if not failures:
        shutil.rmtree(made)
    sys.exit(bool(failures))
