"""shard in real processes: one pair runs moving boundaries, norms, precision and checkpoints."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.ranks import in_processes
from test_deltas import batch, build
from test_replicate import OPTIMIZERS, SCHEDULES
from test_shard import whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxlocal
from fxlocal import Driver, Hebbian, LocalPrefix, Oja, Plan
from fxlocal.experiments.models.catalogue import build_model

pytestmark = pytest.mark.slow  # starts processes
EPOCHS, STEPS = 5, 3
MOVING = [
    ("hebbian", "adamw"), ("oja", "sgd"), ("custom", "adamw"), ("relative", "sgd"),
    ("freeze", "adamw"), ("supervised", "sgd"), ("refreshed", "adamw"), ("dynamic", "sgd"),
]  # fmt: skip


def drive(rank, schedule, optimizer, alone):
    """Train by a driver over several boundaries; on one of two ranks, or alone."""
    driver = Driver(build(rank), SCHEDULES[schedule])
    if not alone:
        fxlocal.shard(driver)
    driver.optimizer = OPTIMIZERS[optimizer](driver.parameters())
    for epoch in range(EPOCHS):
        driver.start_epoch()
        for step in range(STEPS * epoch, STEPS * epoch + STEPS):
            x = batch(step, 6)
            loss = driver.network()(x if alone else x.split(3)[rank]).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(driver.parameters(), 0.5)
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
    return whole(driver.model.state_dict()), driver.losses, driver.history


def residual(seed, rule, norm, dtype=torch.float64):
    model = build_model("resnet8", num_classes=10, in_channels=3, width=8, seed=seed).to(dtype)
    return fxlocal.transform(model, Plan(local=LocalPrefix("layer3.0.conv1", rule, norm=norm)))


def fit(net, optimizer=None, dtype=torch.float64):
    """Train on what all ranks have, so that batch norms see the same batch."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        net(x.to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(net.state_dict())


class Reused(nn.Module):
    """Calls a layer twice, and uses the weight of another as an expression."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        x = self.first(self.second(self.first(x).tanh()).tanh()).tanh()
        return self.last(self.third(x).tanh() @ self.third.weight)


def reuse(rank, sharded):
    plan = Plan(local=LocalPrefix("third", Oja(0.05)))
    net = fxlocal.transform(Reused(rank), plan)
    net = fxlocal.shard(net) if sharded else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        x = batch(step, 16).reshape(-1, 6)
        net(x.chunk(2)[rank] if sharded else x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(net.state_dict())


def narrow():
    """Train with gathered weights in bfloat16; the weights' dtypes and what moved."""
    net = residual(0, Oja(1e-3), "eval", torch.float32)
    before = net.conv1.weight.detach().clone()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fxlocal.shard(net, mp_policy=policy)
    moved = fit(net, dtype=torch.float32)["conv1.weight"] - before
    return {p.dtype for p in net.parameters()}, float(moved.norm())


def resumed(folder):
    """Train, save and go on; and load in what a fresh process would make, and go on."""
    found = []
    for seed in (0, 1):
        net = fxlocal.shard(residual(seed, Hebbian(1e-2), "eval"))
        optimizer = torch.optim.AdamW(net.parameters())
        if seed == 0:
            fit(net, optimizer)
        model, state = get_state_dict(net, optimizer)
        told = {"model": model, "optim": state}
        if seed == 0:
            dcp.save(told, checkpoint_id=folder / "saved")
        else:
            planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(told, checkpoint_id=folder / "saved", planner=planner)
            set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
        found.append((list(model), fit(net, optimizer)))
    return found


def all_of(rank, folder):
    warnings.simplefilter("ignore")
    moving = {case: drive(rank, *case, alone=False) for case in MOVING}
    norms = {norm: fit(fxlocal.shard(residual(rank, Hebbian(1e-2), norm))) for norm in NORMS}
    return moving, norms, reuse(rank, sharded=True), narrow(), resumed(folder)


NORMS = ("train", "eval")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return in_processes(all_of, folder, folder)


@pytest.mark.parametrize("case", MOVING, ids="-".join)
def test_a_boundary_moves_over_shards(ranks, case):
    state, losses, history = drive(0, *case, alone=True)
    assert len(set(history)) >= (2 if case[0] == "dynamic" else 4)
    for moving, *_ in ranks:
        theirs, their_losses, their_history = moving[case]
        assert their_history == history
        assert their_losses == pytest.approx(losses, abs=1e-10)
        torch.testing.assert_close(theirs, state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_shortcuts(ranks, norm):
    expected = fit(residual(0, Hebbian(1e-2), norm))
    for _, norms, *_ in ranks:
        torch.testing.assert_close(norms[norm], expected, rtol=0, atol=1e-10)


def test_a_layer_that_is_called_twice_and_a_weight_in_an_expression(ranks):
    for _, _, found, *_ in ranks:
        torch.testing.assert_close(found, reuse(0, sharded=False), rtol=0, atol=1e-10)


def test_weights_keep_their_precision(ranks):
    for *_, (dtypes, moved), _ in ranks:
        assert dtypes == {torch.float32}
        assert 0.0005 < moved <= 0.003001  # three steps of 0.001


def test_a_checkpoint_goes_on_exactly_in_a_fresh_process(ranks):
    for *_, ((names, before), (_, after)) in ranks:
        assert names == list(residual(0, Hebbian(1e-2), "eval").state_dict())
        for name, value in before.items():
            if "running" not in name:
                assert torch.equal(after[name], value), name
