"""What changes under replicate, what ranks may differ in, and what is refused."""

import pytest
import torch
from support.ranks import RULES, batch, build, build_in_turn, in_processes, in_threads, plan_of
from torch import distributed, nn

import fxlocal
from fxlocal import Driver, Plan, PlanError, Zero, replicate
from fxlocal.schedules import Approximation, Static, combine

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


def freezing(rank, size):
    """Freeze a layer and thaw another after the first step."""

    def make():
        model = build()
        model[5].weight.requires_grad_(False)
        return fxlocal.transform(model, plan_of("hebbian", "2"))

    in_turn = build_in_turn if size > 1 else lambda function: function()
    net = replicate(in_turn(make))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(4):
        if step == 2:
            net.get_parameter("5.weight").requires_grad_(True)
            net.get_parameter("7.weight").requires_grad_(False)
            in_turn(net.prepare_call)
        x = batch(step, 4)
        net(x.chunk(size)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def test_what_is_frozen_or_thawed_later():
    first, second = in_threads(freezing, 2)
    for name, value in freezing(0, 1).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10, msg=name)
        assert torch.equal(first[name], second[name]), name


def by_rank(rank, method):
    """In turns one rank has no gradient of the first layers."""
    tables = [
        Approximation(method, slice(None), batches, ranks=slice(r, r + 1))
        for r, batches in enumerate((EVEN, ODD))
    ]
    driver = replicate(build_in_turn(lambda: Driver(build(), combine(*tables))))
    optimizer = torch.optim.SGD(driver.parameters(), lr=0.1)
    build_in_turn(driver.start_epoch)
    for step in range(4):
        net = build_in_turn(driver.network)
        net(batch(step, 4).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return driver.model.state_dict()


def test_a_rank_without_a_gradient_counts_as_zeros():
    expected, _ = in_threads(by_rank, Zero())
    for found in in_threads(by_rank, Zero(none=True)):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-14)


def compiled(rank):
    net = replicate(build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian"))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    called = torch.compile(net, backend="eager", fullgraph=True)
    for step in range(3):
        called(batch(step, 4).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.slow  # starts processes, as Dynamo does not compile in two threads at a time
def test_a_compiled_network(tmp_path):
    first, second = in_processes(compiled, tmp_path)
    net = fxlocal.transform(build(), plan_of("hebbian"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        net(batch(step, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10, msg=name)
        assert torch.equal(first[name], second[name]), name


def attached(rank, size):
    def make():
        schedule = Static(epochs=3, largest=0.9, start=0.2, rule=RULES["hebbian"], align=False)
        driver = fxlocal.attach(build(), schedule)
        driver.optimizer = torch.optim.SGD(driver.model.parameters(), lr=0.1)
        return driver

    in_turn = build_in_turn if size > 1 else lambda function: function()
    driver = replicate(in_turn(make))
    for epoch in range(3):
        in_turn(driver.start_epoch)
        in_turn(driver.network)
        driver.model(batch(epoch, 4).chunk(size)[rank]).square().mean().backward()
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        driver.end_epoch()
    driver.detach()
    return driver.model.state_dict(), driver.history


def test_an_attached_model():
    (first, history), (second, _) = in_threads(attached, 2)
    expected, moves = attached(0, 1)
    assert history == moves and len(set(moves)) == 3
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10, msg=name)
        assert torch.equal(first[name], second[name]), name


def verified(rank):
    net = replicate(build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian"))))
    before = net.get_parameter("0.weight").clone()
    if rank == 0:
        found = fxlocal.verify(net, batch(0, 2))
        assert found.layers[0].trained_by == "local rule"
    assert torch.equal(net.get_parameter("0.weight"), before)


def test_one_rank_may_verify():
    in_threads(verified)


def refused(rank, how):
    def make():
        model = build()
        if how == "model" and rank:
            model[7] = nn.Linear(6, 3).double()
        return fxlocal.transform(model, plan_of("hebbian" if rank or how != "plan" else "freeze"))

    net = build_in_turn(make)
    group = None
    if how == "group":
        group = distributed.new_group([rank], use_local_synchronization=True)
        net = build_in_turn(lambda: fxlocal.transform(build(), Plan(), process_group=group))
        group = distributed.group.WORLD
    replicate(net, group)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("plan", "rank 1 differs from rank 0: Plan is"),
        ("model", r"rank 1 differs from rank 0: '7.weight' is \(3, 6\) there and \(2, 6\) on"),
        ("group", "deltas are summed in ''"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(how, message):
    with pytest.raises((RuntimeError, PlanError), match=message):
        in_threads(refused, how)


def test_refusals_without_a_group(monkeypatch):
    with pytest.raises(TypeError, match=r"replicate\(Linear\): give what fxlocal"):
        replicate(nn.Linear(2, 2))
    net = fxlocal.transform(build(), Plan())
    assert replicate(net) is net and "reducer" not in net.meta
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2 is set, and there is no process group"):
        replicate(net)
