"""N ranks of a batch b learn locally as one process of N * b does."""

import sys

import expecttest
import pytest
import torch
from fxlocal.passes import reduce_deltas
from support.ranks import RULES, batch, build, build_in_turn, in_threads, plan_of
from torch import distributed, nn

import fxlocal
from fxlocal import Custom, Hebbian, PlanError
from fxlocal.ir.source import train_mode
from fxlocal.ops.ranks import find_group


def train(net, batches, optimizer=None):
    """Train with gradients of a mean over all ranks' samples, averaged by hand."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, count in batches:
        (net(x).square().sum() / count).backward()
        for p in net.parameters() if distributed.is_initialized() else ():
            if p.grad is not None:
                distributed.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def on_rank(rank, rule, sizes, steps=4, make=build):
    net = build_in_turn(lambda: fxlocal.transform(make(), plan_of(rule)))
    offset = sum(sizes[:rank])
    own = slice(offset, offset + sizes[rank])
    return train(net, [(batch(step, sum(sizes))[own], sum(sizes)) for step in range(steps)])


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_equal_one_process(rule, sizes):
    found = in_threads(on_rank, rule, sizes, size=len(sizes))
    net = fxlocal.transform(build(), plan_of(rule))
    expected = train(net, [(batch(step, sum(sizes)), sum(sizes)) for step in range(4)])
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10)
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name
    moved = [n for n, v in build().state_dict().items() if not torch.equal(v, expected[n])]
    assert ("0.weight" in moved) == (rule != "freeze")


def printed(at_end=True, until="5"):
    """What `reduce_deltas` does to a graph."""
    net = fxlocal.transform(build(), plan_of("hebbian", until))
    with train_mode(net):
        before = net.clone()
        reduce_deltas(net, group="0", at_end=at_end)
        net.graph.lint()
    return fxlocal.diff_graphs(before, net)


class TestGraph(expecttest.TestCase):
    def test_sums_go_in_a_bucket_and_updates_to_the_end(self):
        self.assertExpectedInline(
            printed(),
            """\
-%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta, %rate)  # insert_local_updates @0
-%_2_update = call_function fxlocal.normalised_add_(%_2_weight, %_2_delta, %rate)  # insert_local_updates @2
+%wide_0 = call_function fxlocal.widened([%_0_delta, %_2_delta], [%_0_weight, %_2_weight])  # reduce_deltas @0
+%sums_0 = call_function _c10d_functional.all_reduce_coalesced(%wide_0, 'sum', '0')  # reduce_deltas @0
+with torch.no_grad():
+%_0_delta_part = call_function getitem(%sums_0, 0)  # reduce_deltas @0
+%_0_delta_sum = call_function _c10d_functional.wait_tensor(%_0_delta_part)  # reduce_deltas @0
+%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta_sum, %rate)  # insert_local_updates @0
+%_2_delta_part = call_function getitem(%sums_0, 1)  # reduce_deltas @2
+%_2_delta_sum = call_function _c10d_functional.wait_tensor(%_2_delta_part)  # reduce_deltas @2
+%_2_update = call_function fxlocal.normalised_add_(%_2_weight, %_2_delta_sum, %rate)  # insert_local_updates @2
+end torch.no_grad()""",  # noqa: E501
        )

    def test_in_stages_each_sum_stays_where_its_delta_is(self):
        self.assertExpectedInline(
            printed(at_end=False),
            """\
-%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta, %rate)  # insert_local_updates @0
+%wide_0 = call_function fxlocal.widened([%_0_delta], [%_0_weight])  # reduce_deltas @0
+%sums_0 = call_function _c10d_functional.all_reduce_coalesced(%wide_0, 'sum', '0')  # reduce_deltas @0
+%_0_delta_part = call_function getitem(%sums_0, 0)  # reduce_deltas @0
+%_0_delta_sum = call_function _c10d_functional.wait_tensor(%_0_delta_part)  # reduce_deltas @0
+%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta_sum, %rate)  # insert_local_updates @0
-%_2_update = call_function fxlocal.normalised_add_(%_2_weight, %_2_delta, %rate)  # insert_local_updates @2
+%wide_1 = call_function fxlocal.widened([%_2_delta], [%_2_weight])  # reduce_deltas @2
+%sums_1 = call_function _c10d_functional.all_reduce_coalesced(%wide_1, 'sum', '0')  # reduce_deltas @2
+%_2_delta_part = call_function getitem(%sums_1, 0)  # reduce_deltas @2
+%_2_delta_sum = call_function _c10d_functional.wait_tensor(%_2_delta_part)  # reduce_deltas @2
+%_2_update = call_function fxlocal.normalised_add_(%_2_weight, %_2_delta_sum, %rate)  # insert_local_updates @2""",  # noqa: E501
        )


@pytest.mark.parametrize(("limit", "sums"), [(1, 3), (1500, 2), (10**6, 1)])
def test_buckets_are_filled_in_order(monkeypatch, limit, sums):
    monkeypatch.setattr(sys.modules[reduce_deltas.__module__], "BUCKET_BYTES", limit)
    lines = printed(until="7").splitlines()  # of 864, 1152 and 3072 bytes
    assert sum("all_reduce_coalesced" in line for line in lines) == sums
    assert sum("wait_tensor" in line for line in lines) == 3


def not_finite(rank):
    """Rank 1 has deltas that are not finite."""
    rule = Custom(lambda weight, pre, post, product: product(pre, post), rate=0.05)
    net = build_in_turn(lambda: fxlocal.transform(build(), plan_of(rule)))
    before = net.get_parameter("0.weight").clone()
    net(batch(0, 3) * (torch.nan if rank else 1.0))
    return torch.equal(net.get_parameter("0.weight"), before), int(net.fxlocal.skipped)


def test_what_is_finite_is_asked_of_the_sum():
    assert in_threads(not_finite) == [(True, 2), (True, 2)]


def narrow(rank):
    """Deltas in bfloat16 whose sum would lose the small one."""
    made = torch.ops.fxlocal.widened([torch.ones(2).bfloat16()], [torch.ones(2).half()])
    total = torch.ops._c10d_functional.all_reduce_coalesced(made, "sum", find_group())
    return torch.ops._c10d_functional.wait_tensor(total[0])


def test_sums_are_of_float32():
    assert all(t.dtype == torch.float32 and t.tolist() == [2, 2] for t in in_threads(narrow))


def made_before(rank, networks):
    networks[rank](batch(0, 2))


def test_a_network_that_was_made_before_the_group_is_refused():
    networks = [fxlocal.transform(build(), plan_of("hebbian")) for _ in range(2)]
    with pytest.raises(RuntimeError, match="transform again after init_process_group"):
        in_threads(made_before, networks)


def unlike(rank, how):
    rate = 0.01 if how == "plan" and rank else 0.02

    def make():
        model = build(seed=rank)
        if how == "model" and rank:
            model[5] = nn.Linear(64, 7).double()
        return fxlocal.transform(model, plan_of(Hebbian(rate), until="7"))

    net = build_in_turn(make)
    net(batch(0, 2))
    return net.state_dict()


def test_ranks_that_differ_are_named():
    with pytest.raises(RuntimeError, match=r"rank 1 differs from rank 0: Plan is .*rate=0.01"):
        in_threads(unlike, "plan")
    with pytest.raises(RuntimeError, match=r"rank 1 .*'5.weight' is \(7, 64\) there and \(6, 64\)"):
        in_threads(unlike, "model")


def test_ranks_begin_with_the_prefix_of_the_first():
    first, second = in_threads(unlike, "")
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["7.weight"], second["7.weight"])  # the wrapper's


def narrow_weights(rank, stochastic):
    rule = Hebbian(0.5, stochastic=stochastic)
    build_in_turn(lambda: fxlocal.transform(build().bfloat16(), plan_of(rule)))


def test_ranks_do_not_each_round_at_random():
    in_threads(narrow_weights, False)
    with pytest.raises(PlanError, match="layer '0': stochastic=True rounds its weight"):
        in_threads(narrow_weights, True)


def alone(rank):
    group = distributed.new_group([rank], use_local_synchronization=True)
    net = build_in_turn(lambda: fxlocal.transform(build(), plan_of("hebbian"), process_group=group))
    return "all_reduce" in fxlocal.format_graph(net)


def test_a_group_of_one_learns_alone():
    assert not fxlocal.transform(build(), plan_of("hebbian")).meta["ranks"].group
    assert in_threads(alone) == [False, False]


def test_a_rank_without_a_group_is_warned(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="RANK=1 of WORLD_SIZE=2 is set"):
        fxlocal.transform(build(), plan_of("hebbian"))
