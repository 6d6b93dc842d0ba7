"""Models and uses that local modules could get wrong without a word."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.nets import Written
from torch import nn

import fxlocal
from fxlocal import ConvHead, Driver, InfoProHead, LinearHead, LocalModules, Plan, PlanError, Zero
from fxlocal.ir.stages import find_stages
from fxlocal.runtime.compile import ByModule
from fxlocal.schedules import Constant, combine

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    layers = (nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).append(
        nn.Linear(5, 3)
    )


def network(model, *inputs, **options):
    modules = LocalModules(**{"num_classes": 3, "balance": "blocks", **options})
    return fxlocal.transform(model, Plan(modules=modules), *inputs)


def overwrites_input(net, x):
    return net.b(F.relu(net.a(x.mul_(2.0))))


def test_an_input_that_a_linked_layer_overwrites_is_kept_for_its_copy():
    torch.manual_seed(0)
    model = Written(overwrites_input, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    output, _ = network(model, X.clone(), count=2, link=1)(X.clone(), Y)
    torch.testing.assert_close(output, model(X.clone()))


class OverwritesSkip(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [(3, 4), (4, 4), (4, 4), (4, 4), (4, 4)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        skip = self.convs[0](x)
        h = F.max_pool2d(F.relu(self.convs[1](F.relu(skip))), 2)
        h = F.interpolate(F.relu(self.convs[2](h)), scale_factor=2.0)
        h = F.relu(self.convs[3](skip.add_(h))) + skip
        return self.fc(F.relu(self.convs[4](h)).mean((2, 3)))


@pytest.mark.parametrize("link", [0, 1])
def test_a_skip_that_a_module_overwrites_for_a_later_one_is_refused(link):
    with pytest.raises(PlanError, match="in place"):
        network(OverwritesSkip(), IMAGES, count=3, link=link, balance=("convs.1", "convs.3"))


@pytest.mark.parametrize("link", [0, 1])
def test_an_input_with_a_graph_of_its_own_learns_from_the_first_module(link):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)) + x)

    torch.manual_seed(0)
    net, stem = network(Twice(), X, count=2, link=link), nn.Linear(4, 4)
    _, loss = net(stem(X), Y)
    loss.backward()
    assert stem.weight.grad.norm() > 0


@pytest.mark.parametrize(
    "loss", [partial(F.cross_entropy, label_smoothing=0.1), nn.CrossEntropyLoss()]
)
def test_a_driver_with_a_users_loss_resumes(loss):
    def build():
        plan = Plan(modules=LocalModules(2, num_classes=3, loss=loss, balance="blocks"))
        return Driver(mlp(), Constant(plan), example_inputs=(X,))

    driver = build()
    state = driver.state_dict()
    for one in (driver, build()):
        one.load_state_dict(state)
        one.start_epoch()
        one.network()(X, Y)[1].backward()


class Later:
    def plan(self, analysis, epoch, step=0, rank=0):
        modules = LocalModules(2, num_classes=3, balance="blocks")
        return Plan(modules=modules if epoch else None)


def test_a_schedule_that_brings_in_modules_later_is_refused():
    driver = Driver(mlp(), Later(), example_inputs=(X,))
    driver.start_epoch()
    driver.end_epoch()
    with pytest.raises(PlanError, match="first Plan"):
        driver.start_epoch()


def test_a_refused_plan_leaves_no_heads_behind():
    torch.manual_seed(0)
    model = mlp()
    model[3] = nn.RReLU()
    net = fxlocal.transform(model, Plan(), X)
    with pytest.raises(PlanError, match="cannot be drawn again"):
        fxlocal.transform(
            net, Plan(modules=LocalModules(2, link=1, num_classes=3, balance=("4",))), X
        )
    again = fxlocal.transform(
        net, Plan(modules=LocalModules(2, num_classes=3, balance=("4",), head=LinearHead())), X
    )
    assert len(list(again.state_dict())) == len(model.state_dict()) + 2


def test_constants_of_the_capture_outlive_a_refused_plan():
    def shifted(net, x):
        return net.b(net.drop(net.a(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))))

    torch.manual_seed(0)
    net = fxlocal.transform(
        Written(shifted, a=nn.Linear(4, 5), b=nn.Linear(5, 3), drop=nn.RReLU()), Plan(), X
    )
    with pytest.raises(PlanError, match="cannot be drawn again"):
        modules = LocalModules(2, link=1, num_classes=3, balance="blocks")
        fxlocal.transform(net, Plan(modules=modules), X)
    assert list(fxlocal.transform(net, Plan(), X).additions) == list(net.additions) != []


def test_no_weight_gradient_stays_none_in_linked_layers():
    modules = LocalModules(2, link=1, num_classes=3, balance=("4",))
    plan = Plan(modules=modules, weight_grads={"2": Zero(none=True)})
    net = fxlocal.transform(mlp(), plan, X)
    net(X, Y)[1].backward()
    assert net.get_parameter("2.weight").grad is None
    assert net.get_parameter("2.bias").grad is not None


def test_a_layer_called_like_a_loss_is_not_taken_for_one():
    def named(net, x):
        return net.fc(net.loss_0(x).relu())

    stage = find_stages(
        network(Written(named, loss_0=nn.Linear(4, 5), fc=nn.Linear(5, 3)), X, count=2)
    )[0]
    _, (_, loss) = stage(*({"x": X, "target": Y}[name] for name in stage.inputs))
    assert loss.shape == ()


@pytest.mark.parametrize("head", [LinearHead(), ConvHead(4), InfoProHead(4)])
def test_images_may_have_another_size_than_the_example(head):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    up = nn.ConvTranspose2d(4, 3, 2, 2)
    net = network(nn.Sequential(*convs, up), IMAGES, count=2, head=head)
    larger, labels = torch.randn(2, 3, 12, 16), torch.zeros(2, 12, 16, dtype=torch.int64)
    output, loss = net(larger, labels)
    loss.backward()
    assert output.shape == (2, 3, 12, 16)


def test_a_smaller_batch_and_its_sizes_go_through_the_replay_buffer_together():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            size = x.shape[0]
            x = self.b(self.a(x).relu()).relu()
            return self.c(x.view(size, 2, 3).flatten(1))

    net = network(Sized(), X, count=2, replay=2)
    for size in (6, 4, 6, 6):
        output, loss = net(X[:size], Y[:size])
        loss.backward()
    assert len(output) == 6


def test_module_by_module_an_input_with_a_default_may_be_left_out():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, scale=1.0):
            return self.b(self.a(x).relu() * scale)

    torch.manual_seed(0)
    net = network(Scaled(), X, count=2)
    call = ByModule(net, {"backend": "eager"})
    torch.testing.assert_close(call(X, target=Y)[0], net(X, target=Y)[0])


def test_approximations_combine_with_heads():
    plan = Plan(modules=LocalModules(2, link=1, num_classes=3, balance="blocks"))
    convs = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    model = convs.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(3, 3))
    zero = Constant(Plan(weight_grads={"1": Zero()}))
    driver = Driver(model, combine(Constant(plan), zero), example_inputs=(IMAGES,))
    driver.start_epoch()
    heads = [*map(id, driver.heads.parameters())]
    driver.network()(IMAGES, Y)[1].backward()
    assert [*map(id, driver.heads.parameters())] == heads
    assert not model[1].weight.grad.any()
    assert model[0].weight.grad.any()


def test_deep_copies_have_heads_and_buffers_of_their_own():
    net = network(mlp(), X, count=3, replay=2)
    other = copy.deepcopy(net)
    other(X, Y)[1].backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.get_submodule("fxlocal.replay.0")._batches
