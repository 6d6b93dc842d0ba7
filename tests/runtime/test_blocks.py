"""Compiled by block, a network learns as uncompiled, and a boundary that moves compiles nothing."""

import copy
import pickle

import pytest
import torch
from support import laws
from support.drivers import small
from support.nets import NETS, Deep, Written
from torch import nn
from torch._dynamo.utils import counters

import fxlocal
from fxlocal import (
    Checkpoint,
    Driver,
    Freeze,
    Hebbian,
    LocalModules,
    LocalPrefix,
    NoEffectWarning,
    Oja,
    Plan,
    PlanError,
    StochasticDepth,
    TopK,
    compile_blocks,
)
from fxlocal.schedules import Constant

EAGER = {"backend": "eager"}


@pytest.fixture
def uncompiled(monkeypatch):
    """The blocks as they are cut, without Dynamo, which takes its time."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    return counters["stats"]["unique_graphs"]


def deep(count=6):
    torch.manual_seed(0)
    return Deep(count)


DEEP = (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),)


def trained(net, model, inputs, steps=2):
    """What steps leave, to the bit."""
    found = []
    torch.manual_seed(0)
    for _ in range(steps):
        outputs = laws.step(net, inputs)
        found.append([outputs, laws.gradients(model), copy.deepcopy(model.state_dict())])
    return found


def assert_learns_alike(model, inputs, plan, change=lambda model: None):
    """By block and uncompiled, two steps agree to the bit; return the one by block."""
    other = copy.deepcopy(model)
    net = fxlocal.transform(model, plan, *inputs)
    ours = compile_blocks(fxlocal.transform(other, plan, *inputs))
    for _ in range(2):
        theirs, mine = trained(net, model, inputs), trained(ours, other, inputs)
        for a, b in zip(theirs, mine, strict=True):
            laws.assert_equal(b, a, "step")
        change(model), change(other)
    return ours


PLANS = {
    "nothing": Plan(),
    "freeze": Plan(local=LocalPrefix(0.6)),
    "hebbian": Plan(local=LocalPrefix(0.6, Hebbian(0.01))),
    "eval": Plan(local=LocalPrefix(0.6, norm="eval")),
}


@pytest.mark.sample(16)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore::fxlocal.BoundaryWarning", "ignore::fxlocal.NoEffectWarning")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NETS)
def test_it_learns_as_uncompiled(name, plan):
    assert_learns_alike(NETS[name].build(), NETS[name].inputs(), PLANS[plan])


@pytest.mark.usefixtures("uncompiled")
def test_a_boundary_inside_a_block_parts_it():
    plan = Plan(local=LocalPrefix("block1.conv2", Oja(0.01)))
    assert_learns_alike(NETS["residual"].build(), NETS["residual"].inputs(), plan)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "plan",
    [
        Plan(weight_grads={"blocks.2.a": TopK(1, force=True), "blocks.3.a": TopK(1, force=True)}),
        Plan(checkpoint=Checkpoint(3, balance="blocks")),
        Plan(local=LocalPrefix(5), checkpoint=Checkpoint(3, balance="blocks")),
        Plan(drop=StochasticDepth(0.5)),
        Plan(local=LocalPrefix(3, Hebbian(0.1), rates=(0.1, 0.2, 0.3))),
    ],
    ids=["topk", "checkpoint", "both", "rows", "rates"],
)
def test_so_it_does_whatever_the_passes_insert(plan):
    assert_learns_alike(deep(), DEEP, plan)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{"link": 1}, {"replay": 1}], ids=["backlink", "replay"])
def test_local_modules_need_no_graph_that_holds_a_backward(options):
    model, plan = deep(), Plan(modules=LocalModules(3, num_classes=3, balance="blocks", **options))
    net, labels = fxlocal.transform(model, plan, *DEEP), torch.tensor([0, 1, 2, 0, 1])
    other = copy.deepcopy(net)
    ours = compile_blocks(other, **EAGER)
    for _ in range(3):
        results = []
        for call, one in ((net, net), (ours, other)):
            output, loss = call(*DEEP, labels)
            loss.backward()
            results.append([output, loss, [p.grad for p in one.parameters()], [*one.buffers()]])
        laws.assert_equal(results[1], results[0], "step")


@pytest.mark.usefixtures("uncompiled")
def test_a_weight_that_is_thawed_counts_at_once():
    model = deep()
    model.stem.weight.requires_grad_(False)
    plan = Plan(local=LocalPrefix(3, Hebbian(0.01)))
    ours = assert_learns_alike(
        model, DEEP, plan, change=lambda model: model.stem.weight.requires_grad_(True)
    )
    assert ours.source_model.stem.weight.requires_grad


@pytest.mark.usefixtures("uncompiled")
def test_micro_batches_add_up():
    model = deep()
    other = copy.deepcopy(model)
    plan = Plan(local=LocalPrefix(3, Hebbian(0.01)))
    nets = [fxlocal.transform(one, plan) for one in (model, other)]
    for net, call in ((nets[0], nets[0]), (nets[1], compile_blocks(nets[1], **EAGER))):
        with fxlocal.accumulate(net):
            laws.step(call, DEEP)
        laws.step(call, DEEP)
    laws.assert_equal(other.state_dict(), model.state_dict(), "state")
    laws.assert_equal(laws.gradients(other), laws.gradients(model), "gradients")


@pytest.mark.usefixtures("fresh_compiler")
def test_in_evaluation_it_is_the_model():
    model = deep()
    net = compile_blocks(fxlocal.transform(model, Plan(local=LocalPrefix(3))), **EAGER)
    net.eval()
    torch.testing.assert_close(net(*DEEP), model(*DEEP), rtol=0, atol=0)
    assert num_graphs() == 0
    assert "insert_no_grad" in fxlocal.explain(net)


# --- what is compiled -----------------------------------------------------------------------------


def driver_of(model, boundaries, rule, **options):
    plans = [Plan(local=LocalPrefix(b, rule)) if b else Plan() for b in boundaries]
    driver = Driver(model, Moving(plans), **options)
    driver._compile.blocks.options["backend"] = "eager"
    return driver


class Moving:
    """Another Plan in each epoch, again and again."""

    def __init__(self, plans):
        self.plans = plans

    def plan(self, analysis, epoch, step=0, rank=0):
        return self.plans[epoch % len(self.plans)]

    def horizon(self):
        return fxlocal.schedules.base.Horizon(epochs=len(self.plans))


@pytest.mark.sample(1)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.01)])
def test_after_warm_up_a_boundary_move_compiles_nothing(rule):
    """Kinds: stem, block, head. Roles: before the boundary, first behind it, and further behind."""
    driver = driver_of(deep(4), [0, 1, 3, 5], rule, compile="blocks")
    graphs = []
    for _ in range(8):
        driver.start_epoch()
        for _ in range(2):
            laws.step(driver.network(), DEEP)
        driver.end_epoch()
        graphs.append(num_graphs())
    # stem, block and head behind; then stem before, block first; then block before; no more
    assert graphs == [3, 5] + [6] * 6
    assert len(driver._compile.blocks.codes) == 6


@pytest.mark.usefixtures("fresh_compiler")
def test_another_batch_compiles_each_code_once_more():
    net = compile_blocks(fxlocal.transform(deep(3), Plan()), **EAGER)
    for size in (5, 3, 4):
        laws.step(net, (torch.randn(size, 4),))
    assert num_graphs() == 2 * 3  # the second time for any size


@pytest.mark.usefixtures("uncompiled")
def test_what_differs_is_another_kind():
    model = deep(6)
    model.activations[4] = torch.tanh
    driver = driver_of(model, [0], Freeze(), compile="blocks")
    model.blocks[2].norm.eps = 1e-3
    model.blocks[3].b.weight.requires_grad_(False)
    model.blocks[5].b.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    torch.testing.assert_close(driver.network()(*DEEP), model(*DEEP), rtol=0, atol=0)
    assert len(driver._compile.blocks.codes) == 7  # stem, two equal blocks, four others, head


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_a_model_of_its_own(copied):
    model = deep(3)
    net = compile_blocks(fxlocal.transform(model, Plan()))
    before = net(*DEEP)
    other = copied(net)
    torch.nn.init.zeros_(model.stem.weight)
    assert not torch.equal(net(*DEEP), before)
    laws.assert_equal(other(*DEEP), before, "output")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("what", ["input", "result", "view"])
def test_a_change_in_place_is_seen_behind_the_block_that_makes_it(what):
    def body(net, x):
        seen = x if what == "input" else net.first(x)
        changed = seen[:, :2] if what == "view" else seen
        with torch.no_grad():  # ends a block, as does the next one
            before = seen.abs()
        changed.relu_()
        hidden = net.second(seen * 2)
        with torch.no_grad():
            behind = hidden.abs()
        return net.last(seen + hidden) + before + behind

    torch.manual_seed(0)
    model = Written(body, **{name: nn.Linear(4, 4) for name in ("first", "second", "last")})
    inputs = [DEEP[0].clone() for _ in range(2)]
    assert_learns_alike(copy.deepcopy(model), DEEP, Plan())(inputs[0])
    model(inputs[1])
    laws.assert_equal(inputs[0], inputs[1], "input")


# --- which of both --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "boundaries", "chosen"),
    [(6, [0, 1, 3, 5], "by block"), (6, [3], "whole"), (1, [0, 1], "whole")],
)
def test_true_chooses_what_compiles_less(count, boundaries, chosen):
    driver = driver_of(deep(count), boundaries, Freeze(), compile=True)
    assert f"compile=True: {chosen}; codes" in driver.explain()
    assert driver._compile._by_block == (chosen == "by block")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.01), Hebbian(0.01, relative=True)])
def test_the_count_is_what_is_compiled(rule):
    driver = driver_of(deep(), [0, 1, 3, 5, 7], rule, compile=True)
    assert "codes of blocks, equal ones shared: 6, Plans x blocks: 5 x 8" in driver.explain()
    for _ in range(5):
        driver.start_epoch()
        laws.step(driver.network(), DEEP)
        driver.end_epoch()
    assert len(driver._compile.blocks.codes) == 6


@pytest.mark.usefixtures("fresh_compiler")
def test_without_block_edges_it_is_whole_and_says_so():
    with pytest.warns(NoEffectWarning, match="no block edges"):
        driver = Driver(nn.Linear(4, 2), Constant(), compile="blocks")
    assert "whole, as the graph has no block edges" in driver.explain()
    with pytest.warns(NoEffectWarning, match="no block edges"):
        compile_blocks(fxlocal.transform(nn.Linear(4, 2), Plan()), **EAGER)(torch.ones(1, 4))
    assert num_graphs() == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="give True, 'blocks'"):
        Driver(small(), Constant(), compile="block")
    with pytest.raises(TypeError, match="transform the model first"):
        compile_blocks(small())
    net = fxlocal.transform(deep(), Plan(drop=StochasticDepth(0.5, mode="block")))
    with pytest.raises(PlanError, match="compiled code cannot hold"):
        compile_blocks(net)


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_agrees():
    model = NETS["residual"].build()
    other, plan = copy.deepcopy(model), Plan(local=LocalPrefix(3, Hebbian(0.01)))
    inputs = NETS["residual"].inputs()
    theirs = trained(fxlocal.transform(model, plan), model, inputs)
    ours = trained(compile_blocks(fxlocal.transform(other, plan)), other, inputs)
    for a, b in zip(theirs, ours, strict=True):
        for mine, expected in zip(b, a, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
