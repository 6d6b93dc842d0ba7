"""Real processes: one pair runs all that threads cannot show."""

import os
import warnings

import pytest
import torch
from support.ranks import batch, build, in_processes, plan_of
from test_ddp import CASES, train
from test_replicate import run
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan

pytestmark = pytest.mark.slow  # starts processes, compiles
NAMES = ("hebbian", "freeze", "none", "link", "replicated")


def compiled(rank, backend, outside):
    """Train a compiled network, the wrapper outside or inside."""
    net = fxlocal.transform(build(), plan_of("hebbian"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    how = {"backend": backend}
    if outside:
        called = torch.compile(DistributedDataParallel(net), **how)
    else:
        called = DistributedDataParallel(torch.compile(net, fullgraph=True, **how))
    for step in range(3):
        optimizer.zero_grad()
        called(batch(step, 4)[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    return net.state_dict()


def statistics(rank):
    """Train a prefix with norms that use and keep their running statistics."""
    torch.manual_seed(rank)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    model = nn.Sequential(*layers).double()
    prefix = LocalPrefix("4", Hebbian(0.05), norm="eval")
    net = fxlocal.replicate(fxlocal.transform(model, Plan(local=prefix)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    share = slice(2 * rank, 2 * rank + 2) if distributed.is_initialized() else slice(None)
    for step in range(3):
        net(batch(step, 4)[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def all_of(rank):
    torch.set_default_dtype(torch.float32)
    warnings.simplefilter("ignore")
    found = {name: train(rank, *CASES[name]) for name in NAMES}
    found["moving"] = run("hebbian", "adamw", rank, alone=False)[0]
    found["statistics"] = statistics(rank)
    found["inside"] = compiled(rank, "inductor", outside=False)
    found["outside"] = compiled(rank, "aot_eager", outside=True)
    return found


def test_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    first, second = in_processes(all_of, tmp_path)
    expected = {name: train(0, CASES[name][0], "", 1) for name in NAMES}
    expected |= {"moving": run("hebbian", "adamw")[0], "statistics": statistics(0)}
    for name, state in first.items():
        for key, value in expected.get(name, expected["hebbian"]).items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-10, msg=f"{name} {key}")
            assert torch.equal(state[key], second[name][key]), (name, key)
