"""Lose a rank at random moments of a run of 200 steps, go on each time, and compare.

    PYTHONPATH=tests python -m support.kills 20 FOLDER

says after how many steps each rank was killed, and how; it ends with an error if a stop is not one
clean line, a checkpoint does not load, or what came of the run differs by a bit from one that was
left alone.
"""

import dataclasses
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path

import torch
from torch import nn

from fxlocal.experiments.training.ranks import train_parallel
from fxlocal.parallel import ParallelError

from .tiny import SETTINGS, experiment, fake_data, schedule_of

RANKS = 2


class Killer:
    """Kills a rank after so many steps of a run, and a moment."""

    def __init__(self, rank, number, steps, moment):
        self.rank, self.number, self.steps, self.moment = rank, number, steps, moment
        self.seen, self.done = 0, False

    def step(self, reading):
        self.seen += 1
        if self.seen == self.steps:
            threading.Timer(self.moment, self.kill).start()

    def kill(self):
        ranks = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
        if len(ranks) == RANKS:
            self.done = True
            os.kill(ranks[self.rank].pid, self.number)


def train(path, epochs, **how):
    """Return what came of a run, by losses and weights; it goes on from its checkpoint."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3)]
    model = nn.Sequential(*convs, nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 10))
    schedule = schedule_of("local-static(start=0.25,largest=0.8)", epochs)
    settings = dataclasses.replace(SETTINGS, epochs=epochs, lr=0.01)
    job = experiment(model, schedule, settings, data=fake_data())
    run = train_parallel(job, RANKS, checkpoint=path, resume=path.exists(), **how)
    return run.loss, model.state_dict()


def lose_ranks(kills, epochs, folder, seed=0):
    """Kill so many ranks of a run of four steps an epoch; return what was killed, and the runs."""
    draw, path, killed = random.Random(seed), folder / "checkpoint.pt", []
    while len(killed) < kills:
        left = 4 * epochs - 4 * (len(saved(path)) if path.exists() else 0)
        steps = draw.randint(1, max(1, 2 * left // (kills - len(killed) + 2)))
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        killer = Killer(draw.randrange(RANKS), number, steps, draw.uniform(0, 0.02))
        try:
            train(path, epochs, on_step=killer.step)
        except ParallelError as error:
            said = rf"rank {killer.rank} ended or did not answer: it ended with {number.name}"
            assert killer.done and re.fullmatch(said, str(error)), error
        else:
            raise AssertionError(f"the run ended before a rank was killed, after {steps} steps")
        assert not multiprocessing.active_children()
        if path.exists():
            saved(path)  # it loads
        killed.append((killer.rank, number.name, steps))
        print(f"kill {len(killed)}: rank {killer.rank} by {number.name} after {steps} steps")
    return killed, train(path, epochs), train(folder / "alone.pt", epochs)


def saved(path):
    """Return the losses of the epochs that a checkpoint has."""
    return torch.load(path)["state"]["run"]["loss"]


if __name__ == "__main__":
    _, (losses, state), (expected, alone) = lose_ranks(int(sys.argv[1]), 50, Path(sys.argv[2]))
    assert losses == expected and all(torch.equal(state[name], alone[name]) for name in alone)
    print("equal to the bit")
