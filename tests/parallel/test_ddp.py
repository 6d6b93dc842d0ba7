"""DistributedDataParallel around a network: exact from the first step, or refused by name."""

import gc
import weakref

import pytest
import torch
from support.ranks import batch, build, build_in_turn, in_threads, plan_of
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxlocal
from fxlocal import LocalModules, Plan, TopK, Zero, replicate
from fxlocal.experiments.models.catalogue import build_model

MODULES = {link: Plan(modules=LocalModules(2, link=link, num_classes=2)) for link in (0, 1)}
ZEROS = {path: Zero(none=True) for path in ("2", "5")}
CASES = {  # by plan, and how it is wrapped
    "hebbian": (plan_of("hebbian"), ""),
    "oja": (plan_of("oja"), "unused"),
    "freeze": (plan_of("freeze"), ""),
    "none": (Plan(weight_grads=ZEROS), ""),
    "topk": (Plan(weight_grads={"2": TopK(2, force=True)}), ""),
    "prefix and none": (plan_of("hebbian", "2", weight_grads={"5": Zero(none=True)}), ""),
    "compiled": (plan_of("hebbian"), "compiled"),
    "modules": (MODULES[0], "unused"),
    "link": (MODULES[1], "unused"),
    "replicated": (plan_of("hebbian"), "replicate"),
    "replicated modules": (MODULES[0], "replicate"),
    "replicated link": (MODULES[1], "replicate"),
}


QUICK = ("hebbian", "freeze", "prefix and none", "replicated link")


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def wrapped(net, how):
    if how == "replicate":
        return replicate(net)
    if how.startswith("held"):
        net = Holder(net)
    if how == "compiled":
        net = torch.compile(net, backend="eager", fullgraph=True)
    return DistributedDataParallel(net, find_unused_parameters="unused" in how)


def train(rank, plan, how, size=2, steps=3):
    """Train on one rank of several, or for ``size`` of them alone."""

    def make():
        net = fxlocal.transform(build(0 if size == 1 else rank), plan, batch(0, 2))
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    net, optimizer = build_in_turn(make) if size > 1 else make()
    called = wrapped(net, how) if size > 1 else net
    for step in range(steps):
        x, target = batch(step, 4), torch.arange(4) % 2
        if size > 1:
            x, target = x[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        loss = called(x, target)[1] if plan.modules else called(x).square().mean()
        loss.backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES]
)
def test_a_wrapper_is_exact_from_the_first_step(case):
    plan, how = CASES[case]
    for steps in (1, 3):
        first, second = in_threads(train, plan, how, 2, steps)
        expected = train(0, plan, "", 1, steps)
        for name, value in expected.items():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10, msg=name)
            assert torch.equal(first[name], second[name]), name


REFUSED = {
    "held": (plan_of("hebbian"), "held", "'0.weight', which lies before the boundary"),
    "held frozen": (plan_of("freeze"), "held", "find_unused_parameters=True"),
    "modules": (MODULES[0], "", "find_unused_parameters=True only"),
    "none": (Plan(weight_grads=ZEROS), "held", r"Zero\(none=True\) for '2.weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrapper_that_would_average_wrongly_is_refused(case):
    plan, how, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        in_threads(train, plan, how)


def let_go(rank):
    net = build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian")))
    wrapper = DistributedDataParallel(net)
    wrapper(batch(0, 2)).sum().backward()
    alive = weakref.ref(wrapper)
    del wrapper
    gc.collect()
    return alive() is None


def test_a_network_does_not_keep_its_wrapper():
    assert in_threads(let_go) == [True, True]


def bytes_sent(rank, rule, how):
    """How many bytes a rank hands to the process group in a step, by ResNet-18's boundary 15."""
    group = distributed.group.WORLD
    sent = []

    def counted(whole):
        def count(tensor_list, *options):
            sent.append(sum(t.numel() * t.itemsize for t in tensor_list))
            return whole(tensor_list, *options)

        return count

    for name in ("allreduce", "allreduce_coalesced"):
        setattr(group, name, counted(getattr(group, name)))

    def make():
        model = build_model("resnet18", num_classes=10, in_channels=3, seed=0)
        return fxlocal.transform(model, plan_of(rule, 15))

    net = build_in_turn(make)
    called, steps = wrapped(net, how), []
    for _ in range(2):
        sent.clear()
        called(torch.randn(2, 3, 32, 32)).square().mean().backward()
        steps.append(sum(sent))
    prefix = [p for p in net.meta["prefix"] if p.dim() == 4]
    learned = sum(p.numel() for p in net.parameters()) - sum(map(Tensor.numel, net.meta["prefix"]))
    return steps, 4 * learned, 4 * sum(map(Tensor.numel, prefix))


@pytest.mark.slow
def test_nothing_is_sent_for_a_prefix_but_deltas():
    for how in ("", "replicate"):
        steps, learned, _ = in_threads(bytes_sent, "freeze", how)[0]
        assert learned <= max(steps) <= 1.01 * learned, how
        steps, learned, deltas = in_threads(bytes_sent, "hebbian", how)[0]
        assert learned + deltas <= max(steps) <= 1.01 * learned + deltas, how
    steps, learned, deltas = in_threads(bytes_sent, "freeze", "held, unused")[0]
    assert max(steps) >= learned + deltas  # all of them
