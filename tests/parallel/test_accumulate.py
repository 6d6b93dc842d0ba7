"""Micro-batches add up to a step: the deltas of a prefix too, which moves once."""

from contextlib import nullcontext

import expecttest
import pytest
import torch
from fxlocal.passes import accumulate_deltas, reduce_deltas
from support.ranks import batch, build, build_in_turn, in_threads, plan_of
from torch.nn.parallel import DistributedDataParallel

import fxlocal
from fxlocal import Driver, Hebbian, PlanError, accumulate, replicate
from fxlocal.ir.source import train_mode
from fxlocal.schedules import Static

MICRO, STEPS = 3, 3


def train(rank, rule, how, size, micro):
    """Train with ``micro`` micro-batches of 12 / micro samples a step, on one rank of ``size``."""

    def make():
        net = fxlocal.transform(build(), plan_of(rule))
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    net, optimizer = build_in_turn(make) if size > 1 else make()
    called = net
    if how == "ddp":
        called = DistributedDataParallel(net)
    elif how == "replicate":
        replicate(net)
    elif how == "compiled":
        called = torch.compile(net, backend="eager", fullgraph=True)
    for step in range(STEPS):
        for i, x in enumerate(batch(step, 12).chunk(micro)):
            last = i == micro - 1
            more = called.no_sync if how == "ddp" else lambda: accumulate(net)
            with nullcontext() if last else more():
                (called(x.chunk(size)[rank]).square().mean() / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize("rule", ["hebbian", "oja", "custom", "freeze"])
@pytest.mark.parametrize("how", ["", "ddp", "replicate"])
def test_micro_batches_and_ranks_equal_one_batch(how, rule):
    size = 2 if how else 1
    args = rule, how, size, MICRO
    found = in_threads(train, *args) if how else [train(0, *args)]
    for name, value in train(0, rule, "", 1, 1).items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10)
        assert torch.equal(found[0][name], found[-1][name]), name


@pytest.mark.slow  # compiles
def test_each_graph_of_micro_batches_is_compiled(fresh_compiler):
    expected = train(0, "hebbian", "", 1, 1)
    for name, value in train(0, "hebbian", "compiled", 1, MICRO).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


class TestGraph(expecttest.TestCase):
    def printed(self, last, ranks=False):
        net = fxlocal.transform(build(), plan_of("hebbian", "2"))
        with train_mode(net):
            if ranks:
                reduce_deltas(net, group="0", at_end=True)
            before = net.clone()
            accumulate_deltas(net, last=last)
        return fxlocal.diff_graphs(before, net)

    def test_all_but_the_last_add_up(self):
        self.assertExpectedInline(
            self.printed(False),
            """\
-%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta, %rate)  # insert_local_updates @0
+%total_0 = get_attr fxlocal.total_0  # accumulate_deltas @0
+%_0_delta_total = call_function fxlocal.add_delta_(%total_0, %_0_delta)  # accumulate_deltas @0""",  # noqa: E501
        )

    def test_the_last_takes_the_total(self):
        self.assertExpectedInline(
            self.printed(True, ranks=True),
            """\
-%wide_0 = call_function fxlocal.widened([%_0_delta], [%_0_weight])  # reduce_deltas @0
+%total_0 = get_attr fxlocal.total_0  # accumulate_deltas @0
+%_0_delta_total = call_function fxlocal.take_total_(%total_0, %_0_delta)  # accumulate_deltas @0
+%wide_0 = call_function fxlocal.widened([%_0_delta_total], [%_0_weight])  # reduce_deltas @0""",
        )

    def test_nothing_is_sent_before_the_last(self):
        self.assertExpectedInline(
            self.printed(False, ranks=True),
            """\
-%wide_0 = call_function fxlocal.widened([%_0_delta], [%_0_weight])  # reduce_deltas @0
-%sums_0 = call_function _c10d_functional.all_reduce_coalesced(%wide_0, 'sum', '0')  # reduce_deltas @0
+%total_0 = get_attr fxlocal.total_0  # accumulate_deltas @0
+%_0_delta_total = call_function fxlocal.add_delta_(%total_0, %_0_delta)  # accumulate_deltas @0
-with torch.no_grad():
-%_0_delta_part = call_function getitem(%sums_0, 0)  # reduce_deltas @0
-%_0_delta_sum = call_function _c10d_functional.wait_tensor(%_0_delta_part)  # reduce_deltas @0
-%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta_sum, %rate)  # insert_local_updates @0
-end torch.no_grad()""",  # noqa: E501
        )


def test_a_step_of_a_driver_may_have_micro_batches():
    schedule = Static(epochs=2, largest=0.9, start=0.5, rule=Hebbian(0.05), align=False)
    weights = []
    for micro in (1, MICRO):
        driver = Driver(build(), schedule)
        for epoch in range(2):
            driver.start_epoch()
            net = driver.network()
            for i, x in enumerate(batch(epoch, 12).chunk(micro)):
                with accumulate(driver) if i < micro - 1 else nullcontext():
                    net(x).sum().backward()
            driver.end_epoch()
        weights.append(driver.model[0].weight)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)
    assert not torch.equal(weights[0], build()[0].weight)


def test_cuda_graphs_are_refused():
    driver = Driver(build(), Static(epochs=2, rule=Hebbian(0.05)), compile="cudagraph")
    with pytest.raises(PlanError, match="a CUDA graph holds one"), accumulate(driver):
        pass
