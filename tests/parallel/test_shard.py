"""shard: weights in shards over N ranks learn as one process does with all samples."""

import re

import expecttest
import pytest
import torch
from support.ranks import build_in_turn, in_threads
from test_deltas import RULES, batch, build, plan_of
from test_replicate import OPTIMIZERS
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalModules, LocalPrefix, Plan, Zero, shard
from fxlocal.schedules import Static


def whole(state):
    return {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in state.items()}


def train(net, optimizer, share=slice(None), size=6):
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    for step in range(3):
        net(batch(step, size)[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(net.state_dict())


def on_rank(rank, rule, optimizer, size, keep):
    net = build_in_turn(lambda: fxlocal.transform(build(rank), plan_of(rule)))
    shard(net, keep_prefix=keep)
    rows = [p.to_local().shape[0] for p in net.parameters() if hasattr(p, "to_local")]
    return train(net, optimizer, slice(2 * rank, 2 * rank + 2), 2 * size), rows


CASES = [("hebbian", "adamw", 3, False), ("oja", "sgd", 2, False), ("hebbian", "sgd", 2, True)]
OTHERS = [(rule, opt, size, False) for rule in RULES for opt in OPTIMIZERS for size in (2, 3)]
OTHERS += [("freeze", "sgd", 2, True), ("oja", "adamw", 2, True)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in CASES]


@pytest.mark.parametrize(("rule", "optimizer", "size", "keep"), CASES)
def test_ranks_equal_one_process(rule, optimizer, size, keep):
    found = in_threads(on_rank, rule, optimizer, size, keep, size=size)
    net = fxlocal.transform(build(), plan_of(rule))
    expected = train(net, optimizer, size=2 * size)
    for theirs, _ in found:
        assert list(theirs) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-10)
    assert size < 3 or 0 in found[2][1]  # a shard without rows
    moved = torch.equal(expected["0.weight"], build().state_dict()["0.weight"])
    assert moved == (rule == "freeze")


def ragged(rank, rule):
    """Train with 3 samples on one rank and 1 on the other, whose losses say so."""
    net = shard(build_in_turn(lambda: fxlocal.transform(build(), plan_of(rule))))
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for step in range(3):
        x = batch(step, 4).split([3, 1])[rank]
        (2 * len(x) / 4 * net(x).square().mean()).backward()  # ranks are averaged
        optimizer.step()
        optimizer.zero_grad()
    return whole(net.state_dict())


@pytest.mark.parametrize("rule", ["hebbian", "oja"])
def test_ragged_batches(rule):
    expected = train(fxlocal.transform(build(), plan_of(rule)), "sgd", size=4)
    for theirs in in_threads(ragged, rule):
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-10)


def printed(rank):
    net = build_in_turn(lambda: fxlocal.transform(build(), plan_of("relative", "2")))
    return re.sub("'[0-9]+'", "GROUP", shard(net).history.records[-1].diff)


class TestGraph(expecttest.TestCase):
    def test_rows_move_at_the_end(self):
        self.assertExpectedInline(
            in_threads(printed)[0],
            """\
-%_0_delta = call_function fxlocal.conv_delta(%input_1, %_0, %_0_weight, (1, 1), (1, 1), (1, 1), False, 1)  # insert_local_updates @0
-%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta, %rate, relative=True)  # insert_local_updates @0
+%_0_weight_whole = call_function fxlocal.whole(%_0_weight, blank=True)  # reduce_deltas @0
+%_0_delta = call_function fxlocal.conv_delta(%input_1, %_0, %_0_weight_whole, (1, 1), (1, 1), (1, 1), False, 1)  # insert_local_updates @0
+%_0_delta_part = call_function fxlocal.scattered(%_0_delta, torch.float64, GROUP)  # reduce_deltas @0
+with torch.no_grad():
+%_0_delta_shard = call_function _c10d_functional.wait_tensor(%_0_delta_part)  # reduce_deltas @0
+%_0_weight_shard = get_attr 0.weight  # reduce_deltas @0
+%squares = call_function fxlocal.squares([%_0_delta_shard], [%_0_weight_shard])  # reduce_deltas @0
+%squares_sums = call_function _c10d_functional.all_reduce(%squares, 'sum', GROUP)  # reduce_deltas @0
+%squares_sum = call_function _c10d_functional.wait_tensor(%squares_sums)  # reduce_deltas @0
+%_0_update_shard = call_function fxlocal.shard_add_(%_0_weight_shard, %_0_delta_shard, %squares_sum, 0, %rate, relative=True)  # reduce_deltas @0
+end torch.no_grad()""",  # noqa: E501
        )


class Tied(nn.Module):
    """Its first weight is used by two modules, its second by a function."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.free = nn.Parameter(torch.ones(4, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(F.linear(self.second(self.first(x)), self.free))


def refused(rank):
    """Return what is said of each network, driver or mesh that is refused."""

    def driver(**options):
        return Driver(build(), Static(epochs=2), **options)

    def optimized():
        made = driver()
        made.optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        return made

    prefix, local = LocalPrefix("5", Hebbian(0.1)), LocalModules(2, num_classes=2)
    tied = Plan(local=LocalPrefix("last", Hebbian(0.1)))
    makers = {
        "weight_grads": lambda: fxlocal.transform(build(), Plan(weight_grads={"5": Zero()})),
        "modules": lambda: fxlocal.transform(build(), Plan(modules=local), batch(0, 2)),
        "tied": lambda: fxlocal.transform(Tied(), tied),
        "functional": lambda: fxlocal.transform(
            untied(), Plan(local=LocalPrefix("last", Hebbian(0.1)))
        ),
        "computed": lambda: fxlocal.transform(
            parametrized(), Plan(local=LocalPrefix("5", Hebbian(0.1, computed=True)))
        ),
        "optimizer": optimized,
        "compile": lambda: driver(compile=True),
        "kept": driver,
        "replicated": lambda: fxlocal.transform(build(), Plan(local=prefix)),
    }
    found = {}
    for name, make in makers.items():
        given = build_in_turn(make)
        if name == "replicated":
            fxlocal.replicate(given)
        with pytest.raises(fxlocal.PlanError) as error:
            shard(given, keep_prefix=name == "kept")
        found[name] = str(error.value)
        model = given.model if isinstance(given, Driver) else given.source_model
        assert not isinstance(model, FSDPModule)
    with pytest.raises(TypeError, match=r"shard\(Sequential\)"):
        shard(build())
    return found


def untied():
    model = Tied()
    model.second = nn.Linear(4, 4)
    return model


def parametrized():
    model = build()
    nn.utils.parametrizations.weight_norm(model[2])
    return model


def test_what_is_not_done_is_refused_by_name():
    found, _ = in_threads(refused)
    said = {
        "weight_grads": "a Plan with weight_grads={'5': Zero",
        "modules": "a Plan with modules=LocalModules",
        "tied": "the weight of layer 'first' is tied",
        "functional": "or an expression uses it",
        "computed": "layer '2' computes its weight",
        "optimizer": "set driver.optimizer",
        "compile": "compile=...",
        "kept": "keep_prefix=True",
        "replicated": "fxlocal.replicate has the model already",
    }
    for name, text in said.items():
        assert text in found[name], found[name]


def wrapped_by_the_user(rank):
    told = []
    for early in (True, False):
        net = build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian")))
        if not early:
            net(batch(0, 2))
        fully_shard(net if early else net.get_submodule("0"))
        with pytest.raises(RuntimeError) as error:
            net(batch(0, 2))
        told.append(str(error.value))
    net = shard(build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian"))))
    with pytest.raises(fxlocal.PlanError) as error, fxlocal.accumulate(net):
        pass
    with pytest.raises(fxlocal.PlanError, match="in shards already"):
        shard(net)
    return [*told, str(error.value)]


def test_weights_that_are_in_shards_otherwise_are_refused():
    *told, accumulated = in_threads(wrapped_by_the_user)[0]
    assert all("Use fxlocal.shard(net, mesh) in its place" in text for text in told)
    assert "a prefix in shards applies what it learns with each micro-batch" in accumulated


def test_without_a_process_group_it_is_refused():
    with pytest.raises(RuntimeError, match="init_process_group"):
        shard(fxlocal.transform(build(), Plan()))


class Peak(TorchDispatchMode):
    """The most bytes of parameters and gradients that there are at once, and what is gathered."""

    def __init__(self, model):
        super().__init__()
        states = {m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)}
        groups = [group for state in states for group in state._fsdp_param_groups]
        self.parameters = [p for group in groups for p in group.fsdp_params]
        self.num_bytes = self.gathered = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.gathered += "all_gather_copy_in" in str(function)
        self.num_bytes = max(self.num_bytes, sum(map(self._bytes_of, self.parameters)))
        return function(*args, **(kwargs or {}))

    def _bytes_of(self, parameter):
        shard, whole = parameter.sharded_param, getattr(parameter, "_unsharded_param", None)
        found = shard._local_tensor.nbytes * (1 + (shard.grad is not None))
        if whole is not None:
            found += whole.untyped_storage().size()
            found += whole.grad.nbytes if whole.grad is not None else 0
        return found


def peak(rank, rule):
    def make():
        blocks = [m for _ in range(6) for m in (nn.Linear(16, 16, bias=False), nn.ReLU())]
        plan = Plan(local=LocalPrefix("6", rule)) if rule else Plan()
        return fxlocal.transform(nn.Sequential(*blocks), plan)

    net = shard(build_in_turn(make))
    for _ in range(2):
        with Peak(net.source_model) as found:
            net(torch.ones(2, 16)).square().mean().backward()
        net.zero_grad()
    return found.num_bytes, found.gathered


def test_a_prefix_has_no_gradients_and_is_gathered_once():
    (sgd, gathered), *_ = in_threads(peak, None)
    gradients = 3 * 16 * 16 * 4 // 2
    for rule in (Freeze(), Hebbian(0.1)):
        (found, times), *_ = in_threads(peak, rule)
        assert found <= sgd - gradients
        assert times == gathered - 3
    assert gathered == 12
