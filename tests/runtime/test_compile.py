"""torch.compile takes a rewritten network whole, and it learns as it does uncompiled."""

import copy

import pytest
import torch
from support import laws
from support.nets import NETS
from support.zoo import FAMILIES, torchvision_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxlocal
from fxlocal import Driver, Hebbian, LocalPrefix, Plan
from fxlocal.schedules import Constant, Static

RATE = 0.01


# Those that inductor compiles.
INDUCTOR = {"resnet18": 64, "vit_b_32": 64}
# What these are made of is in others too, which are traced sooner.
LARGE = {"densenet121", "efficientnet_v2_s", "inception_v3", "maxvit_t", "mnasnet0_5"}
LARGE |= {"regnet_x_400mf", "resnext50_32x4d", "wide_resnet50_2"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._inductor.config.patch(
        fallback_random=True
    ):  # else its dropout differs from eager's
        yield
    torch._dynamo.reset()


def middle(model, *inputs):
    """A Hebbian prefix of the first half of the layers."""
    return Plan(local=LocalPrefix(len(fxlocal.analyze(model, *inputs).layers) // 2, Hebbian(RATE)))


def trained_twice(model, net, inputs):
    """Two steps with plain SGD; return the outputs, gradients and state after each."""
    seen = []
    for _ in range(2):
        outputs = laws.step(net, inputs)
        seen.append(
            (outputs, copy.deepcopy(laws.gradients(model)), copy.deepcopy(model.state_dict()))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-4)
                    parameter.grad = None
    return seen


def assert_compiles(model, inputs, plan, backend, tolerance=1e-4):
    """Compiled in one graph, two steps equal eager's; return the compiled network."""
    other = copy.deepcopy(model)
    eager = trained_twice(model, fxlocal.transform(model, plan, *inputs), inputs)
    counter = CompileCounterWithBackend(backend)
    net = torch.compile(fxlocal.transform(other, plan, *inputs), backend=counter, fullgraph=True)
    compiled = trained_twice(other, net, inputs)
    assert counter.frame_count == 1
    for ours, theirs in zip(compiled, eager, strict=True):
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)
    return net, other


@pytest.mark.parametrize("name", [pytest.param("unet", marks=pytest.mark.slow), "dropout"])
def test_a_small_network_compiles_whole(name):
    model, inputs = NETS[name].build(), NETS[name].inputs()
    net, source = assert_compiles(model, inputs, middle(model), "aot_eager")
    state = copy.deepcopy(source.state_dict())
    evaluated = laws.step(net.eval(), inputs)
    assert not source.training
    torch.testing.assert_close(evaluated, laws.step(source, inputs), rtol=1e-4, atol=1e-4)
    laws.assert_equal(source.state_dict(), state, "state after evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - INDUCTOR.keys() - LARGE))
def test_each_family_of_torchvision_compiles_whole(name):
    torch.manual_seed(0)
    model = torchvision_model(name, FAMILIES[name])
    inputs = (torch.randn(2, 3, FAMILIES[name], FAMILIES[name]),)
    assert_compiles(model, inputs, middle(model), "aot_eager")


def test_every_family_is_there():
    models = pytest.importorskip("torchvision.models")
    heads = tuple(
        name.rstrip("0123456789").partition("_")[0].rstrip("0123456789") for name in FAMILIES
    )
    for name in models.list_models(module=models):
        assert name.startswith(heads), f"no model of the family of {name}"


@pytest.mark.slow
def test_a_change_of_rate_recompiles_nothing():
    model, inputs = NETS["residual"].build(), NETS["residual"].inputs()
    schedule = Static(epochs=4, largest=0.5, start=0, rule=Hebbian(0.1), rate_decay=(0.5, 1))
    counter = CompileCounterWithBackend("aot_eager")
    driver = Driver(model, schedule, compile={"backend": counter})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            driver.start_epoch()
            for _ in range(2):
                before = model.stem[0].weight.detach().clone()
                laws.step(driver.network(), inputs)
                moved = float((model.stem[0].weight.detach() - before).norm())
                rate = schedule.plan(driver.analysis, driver.epoch).rate
                assert moved == pytest.approx(rate, rel=1e-4)  # the weight's own rounding
            driver.end_epoch()
    assert driver.history[-2:] == [3, 3]
    assert counter.frame_count == len(set(driver.history))


def inductor_case(name):
    torch.manual_seed(0)
    if name == "unet":
        from fxlocal.experiments.models.catalogue import build_model

        return build_model("unet", num_classes=4, width=8), (torch.randn(2, 3, 32, 32),)
    size = INDUCTOR[name]
    return torchvision_model(name, size), (
        torch.randn(8 if name == "resnet18" else 4, 3, size, size),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", *INDUCTOR])
def test_inductor_compiles_whole_and_fuses_the_updates(name):
    """Eager's results, and no call of an opaque operator of ours in the code that it generates."""
    from torch._inductor.utils import run_and_get_code

    model, inputs = inductor_case(name)
    plan, other = middle(model), copy.deepcopy(model)
    eager = trained_twice(model, fxlocal.transform(model, plan), inputs)
    net = torch.compile(fxlocal.transform(other, plan), fullgraph=True)
    compiled, codes = run_and_get_code(lambda: trained_twice(other, net, inputs))
    # 1e-3: inductor's kernels round in another order, and norms of small batches amplify that
    for ours, theirs in zip(compiled, eager, strict=True):
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    code = "\n".join(codes)
    assert "extern_kernels.convolution" in code or "extern_kernels.addmm" in code or "mkl" in code
    assert "fxlocal" not in code


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"mod": "default"}, "unexpected keyword argument 'mod'"),
        ({"mode": "fast"}, "Unrecognized mode=fast"),
        ({"backend": "induktor"}, "Invalid backend: 'induktor'"),
        ({"options": {"triton.graph": True}}, "triton.graph"),
    ],
)
def test_options_that_torch_compile_does_not_take_are_refused_at_once(options, found):
    with pytest.raises(ValueError, match=f"compile=.*{found}"):
        Driver(nn.Linear(2, 2), Constant(Plan()), compile=options)
