"""Stochastic depth against loops by hand with the same draws, and what it refuses."""

import copy
import random
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from support.drops import (
    Attention,
    attention,
    drop_block,
    drop_each,
    drop_path,
    drop_rows,
    preactivation,
    residual,
    survivals,
)
from support.nets import NETS, Written
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as OwnDepth

import fxlocal
from fxlocal import (
    Checkpoint,
    Driver,
    Freeze,
    LocalModules,
    LocalPrefix,
    Plan,
    PlanError,
    StochasticDepth,
    TopK,
    schedules,
    transform,
)

FORWARDS = {"residual": residual, "preactivation": preactivation, "attention": attention}


def build(name: str, own=None, batch: int = 6) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if name == "attention":
        inputs = torch.randn(batch, 7, 3), torch.randn(batch, 7)
        return Attention(own or (lambda x: x)).double(), tuple(v.double() for v in inputs)
    return NETS[name].build().double(), (torch.randn(batch, 3, 8, 8).double(),)


def step(forward, model, inputs):
    torch.manual_seed(5)
    given = [value.clone().requires_grad_() for value in inputs]
    output = forward(*given)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype)
    (output * weights.view_as(output)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"input {i}": value.grad for i, value in enumerate(given)}
    return {"output": output.detach(), **found, **dict(model.named_buffers())}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:  # a block that was left out in the whole step
            assert ours[name] is None, name
        else:  # rows are added up in another order
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-10)


def assert_like(name, plan, sums, own=None):
    """Two steps by ``plan`` are those of the loop whose sums are ``sums``."""
    model, inputs = build(name, own)
    other, net = copy.deepcopy(model), transform(model, plan, *inputs)
    add = iter([*sums, *sums])
    for _ in range(2):
        ours = step(net, model, inputs)
        assert_same(ours, step(partial(FORWARDS[name], other, add=add), other, inputs))
    model.eval()
    assert torch.equal(net(*inputs), model(*inputs))
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "curve", "parts"),
    [
        ("residual", "linear", {}),
        ("residual", "uniform", {"checkpoint": Checkpoint(3, "blocks")}),
        ("residual", "linear", {"weight_grads": {"block2.conv1": TopK(16, force=True)}}),
        ("preactivation", "uniform", {}),
        ("preactivation", "linear", {"checkpoint": Checkpoint(3, "blocks")}),
        ("attention", "linear", {}),
        ("attention", "uniform", {}),
    ],
)
def test_rows_are_those_of_a_loop_over_samples(name, curve, parts):
    plan = Plan(drop=StochasticDepth(0.6, curve=curve), **parts)
    sums = [partial(drop_rows, survival=p) for p in survivals(2, 0.6, curve)]
    model = assert_like(name, plan, sums)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("parts", [{}, {"checkpoint": Checkpoint(3, "blocks")}])
def test_blocks_are_those_that_the_seed_and_the_call_draw(name, parts):
    shares = survivals(2, 0.6)
    sums = []
    for call in (1, 2):
        drawn = random.Random(f"4 {call}")
        sums += [partial(drop_block, survival=p, kept=drawn.random() < p) for p in shares]
    plan = Plan(drop=StochasticDepth(0.6, "block", seed=4), **parts)
    model, inputs = build(name)
    other, net = copy.deepcopy(model), transform(model, plan, *inputs)
    add = iter(sums)
    for _ in range(2):
        ours = step(net, model, inputs)
        assert_same(ours, step(partial(FORWARDS[name], other, add=add), other, inputs))


@pytest.mark.parametrize(
    "own", [OwnDepth(0.4, "row"), lambda x: drop_path(x, 0.4, True)], ids=["torchvision", "timm"]
)
def test_the_models_own_is_replaced_by_its_distribution(own):
    sums = [partial(drop_each, survival=0.6)] * 2
    model, inputs = build("attention", own)
    other = copy.deepcopy(model)
    net = transform(model, Plan(drop=StochasticDepth(replace=True)), *inputs)
    add = iter(sums)
    assert_same(step(net, model, inputs), step(partial(attention, other, add=add), other, inputs))
    assert "bernoulli" not in net.code
    assert "stochastic_depth" not in net.code


def test_a_rate_of_0_is_the_model_bit_for_bit():
    for name in FORWARDS:
        model, inputs = build(name)
        other = copy.deepcopy(model)
        net = transform(model, Plan(drop=StochasticDepth(0.0)), *inputs)
        ours, theirs = step(net, model, inputs), step(other, other, inputs)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("mode", ["row", "block"])
def test_the_mean_of_a_block_is_its_full_sum(mode):
    torch.manual_seed(0)
    model = Written(lambda net, x: x + net.fc(x), fc=nn.Linear(4, 4)).double()
    x = torch.randn(5, 4).double()
    net = transform(model, Plan(drop=StochasticDepth(0.5, mode)), x)
    with torch.no_grad():
        full = model.fc(x)
    draws = 1000
    mean = sum((net(x).detach() - x) / draws for _ in range(draws))
    # Each draw is 0 or the enlarged value: five standard deviations of the mean of so many.
    share = 0.6 if mode == "row" else 0.5
    bound = 5 * full.abs() * ((1 / share - 1) / draws) ** 0.5
    assert (mean - full).abs().sub(bound).max() < 0


def test_the_rewrite_of_one_block():
    model, x = Written(lambda net, x: x + net.fc(x), fc=nn.Linear(4, 4)), torch.randn(6, 4)
    row, block = (transform(model, Plan(drop=StochasticDepth(0.5, m)), x) for m in ("row", "block"))
    assert_expected_inline(
        fxlocal.diff_graphs(block, row),
        """\
-%fc: float32[6, 4] = call_module fc(%x)  # if kept[0]
-%add: float32[6, 4] = call_function add(%x, %fc, alpha=2.0)  # insert_drops @fc  # if kept[0]
+%fc_rows = call_function draw_rows(%x, 0.5, 'fc')  # insert_drops @fc
+%x_taken: float32[3, 4] = call_function take_rows(%x, %fc_rows)  # insert_drops @fc
+%fc: float32[3, 4] = call_module fc(%x_taken)
+%add: float32[6, 4] = call_function add_rows(%x, %fc, %fc_rows)  # insert_drops @fc""",
    )


def test_a_driver_goes_on_with_the_same_draws():
    for mode in ("row", "block"):
        plan = Plan(drop=StochasticDepth(0.6, mode))

        def begin(plan=plan):
            model, inputs = build("residual")
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            by_plan = schedules.Constant(plan)
            return Driver(model, by_plan, optimizer=sgd, example_inputs=inputs), inputs

        def epoch(driver, inputs):
            driver.start_epoch()
            for _ in range(3):
                driver.network()(*inputs).square().mean().backward()
                driver.optimizer.step()
                driver.optimizer.zero_grad()
            driver.end_epoch()

        driver, inputs = begin()
        epoch(driver, inputs)
        state = copy.deepcopy(driver.state_dict())
        epoch(driver, inputs)
        again, _ = begin()
        again.load_state_dict(state)
        epoch(again, inputs)
        for a, b in zip(driver.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_keep_their_layout_and_autocast(layout):
    model, inputs = build("residual")
    model, x = model.float().to(memory_format=layout), inputs[0].float()
    net = transform(model, Plan(drop=StochasticDepth(0.5)), x)
    met = []
    for name in ("conv1", "bn2"):
        module = model.block1.get_submodule(name)
        module.forward = partial(_noting, met, module.forward)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.contiguous(memory_format=layout))
    y.sum().backward()
    assert len(met) == 2
    assert all(len(v) == 5 and v.is_contiguous(memory_format=layout) for v in met)


def _noting(met, forward, value):
    met.append(value)
    return forward(value)


CHAIN = NETS["chain"].build


def _writes(net, x):
    x = net.a(x)
    return x + net.b(x.relu_())


def _reads_late(net, x):
    first = x = net.a(x)
    x += net.b(x)
    return x * first


@pytest.mark.parametrize(
    ("make", "plan", "message"),
    [
        (CHAIN, {}, "no residual blocks"),
        (NETS["residual"].build, {"drop": StochasticDepth(replace=True)}, "ends with a DropPath"),
        (
            NETS["residual"].build,
            {"local": LocalPrefix("block2", Freeze(), "eval")},
            r"StochasticDepth\(rate=0.5.*contradicts LocalPrefix\(until='block2'.*'block1'",
        ),
        (
            NETS["residual"].build,
            {"modules": LocalModules(2, link=1, num_classes=5, balance="blocks")},
            r"StochasticDepth\(rate=0.5.*contradicts LocalModules\(count=2.*'block1'",
        ),
        (
            NETS["residual"].build,
            {"drop": StochasticDepth(0.95)},
            "of a batch of 6, the batch norm 'block2.bn1' .* would see no row",
        ),
        (
            partial(Written, _writes, a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
            {},
            "changes its input in place",
        ),
        (
            partial(Written, _reads_late, a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
            {},
            "is added in place",
        ),
        (
            partial(
                Written,
                lambda net, x: (x := net.a(x).transpose(0, 1)) + net.b(x),
                a=nn.Linear(8, 8),
                b=nn.Linear(8, 8),
            ),
            {},
            "not the 6 rows",
        ),
    ],
)
def test_what_is_refused(make, plan, message):
    model = make()
    plan = Plan(**{"drop": StochasticDepth(0.5), **plan})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        transform(model, plan, torch.randn(6, 3, 8, 8))
    with pytest.raises(PlanError, match=message):
        Driver(model, schedules.Constant(plan), example_inputs=(torch.randn(6, 3, 8, 8),))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_batch_too_small_is_refused_when_it_comes():
    model = Written(lambda net, x: x + net.fc(x), fc=nn.Linear(4, 4))
    net = transform(model, Plan(drop=StochasticDepth(0.9)))
    net(torch.ones(10, 4))
    with pytest.raises(RuntimeError, match="of a batch of 4, no row of 'fc' survives"):
        net(torch.ones(4, 4))


@pytest.mark.parametrize("mode", ["row", "block"])
def test_local_modules(mode):
    """Modules without a link learn from rows; whole blocks are refused."""
    modules = LocalModules(2, num_classes=5, balance="blocks")
    if mode == "block":
        with pytest.raises(PlanError, match="contradicts LocalModules"):
            Plan(drop=StochasticDepth(mode=mode), modules=modules)
        return
    model, inputs = build("residual")
    net = transform(model, Plan(drop=StochasticDepth(), modules=modules), *inputs)
    net(*inputs, torch.arange(6) % 5)[1].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert fxlocal.find_stages(net)[1].inputs[0] != "x"


@pytest.mark.parametrize("plan", [StochasticDepth(mode="block"), StochasticDepth(replace=True)])
def test_what_changes_in_each_step_is_not_compiled(plan):
    model, inputs = build("attention", OwnDepth(0.4, "row"))
    driver = Driver(model, schedules.Constant(Plan(drop=plan)), compile=True, example_inputs=inputs)
    with pytest.raises(PlanError, match="each step computes"):
        driver.start_epoch()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARDS)
def test_compiled_rows_are_the_same_and_one_graph(name):
    model, inputs = build(name)
    net = transform(model, Plan(drop=StochasticDepth(0.6)), *inputs)
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.manual_seed(5)
        eager = net(*inputs)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(*inputs), eager, rtol=0, atol=1e-10)
    assert counter.frame_count == 1
