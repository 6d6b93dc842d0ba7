"""PruneTrain: the penalty by hand, which channels go and when, and runs resumed after cuts."""

import copy
import math

import pytest
import torch
from support.copies import saved
from support.nets import NETS, Blocks
from torch import nn

import fxlocal
from fxlocal import CheckpointError, Driver, Freeze, LocalPrefix, Plan, PlanError, PruneTrain
from fxlocal.schedules import Constant, Static

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(6 * 36, 2))


def test_the_penalty_is_that_of_the_paper():
    # By loops: neither the first layer's inputs, nor the depthwise one, nor the last one's outputs.
    model = net()
    prune = PruneTrain(model, None, share=0.2)
    norm = 0.0
    for out in model[0].weight.detach():
        norm += out.square().sum().sqrt()
    for out in model[2].weight.detach():
        norm += out.square().sum().sqrt()
    for i in range(4):
        norm += model[2].weight.detach()[:, i].square().sum().sqrt()
    for feature in range(216):
        norm += model[4].weight.detach()[:, feature].square().sum().sqrt()
    loss = torch.tensor(3.0)
    penalty = prune.penalty(loss)
    torch.testing.assert_close(penalty / (loss + penalty), torch.tensor(0.2))
    torch.testing.assert_close(prune.strength * norm, penalty)
    # lambda is set once: twice the loss leaves it alone.
    torch.testing.assert_close(prune.penalty(2 * loss), penalty)
    penalty.backward()
    one = model[0].weight[1]
    torch.testing.assert_close(
        model[0].weight.grad[1], (prune.strength * one / one.norm()).detach()
    )
    assert model[1].weight.grad is None


def test_channels_that_are_zero_have_a_gradient_of_zero():
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    PruneTrain(model, None).penalty(torch.tensor(1.0)).backward()
    assert model[0].weight.grad.abs().max() == 0


def small(model, path, channels, size=5e-5, axis=0):
    """Make the weights of some channels small, of either sign."""
    with torch.no_grad():
        weight = model.get_submodule(path).weight
        for channel in channels:
            weight.select(axis, channel).uniform_(-1, 1).sign_().mul_(size)


def test_a_channel_goes_once_it_is_small_in_all_its_layers_and_it_is_time():
    model = NETS["chain"].build()
    prune = PruneTrain(model, None, every=2, threshold=1e-4)
    small(model, "conv2", [0])  # not so the inputs of conv3
    for path, axis in (("conv2", 0), ("conv3", 1)):
        with torch.no_grad():  # below the threshold as they are signed, but not in size
            model.get_submodule(path).weight.select(axis, 4).fill_(-1.0)
    for path, axis in (("conv1", 0), ("conv2", 1)):
        small(model, path, [1, 3], axis=axis)
    prune.end_epoch()
    assert prune.kept == {}
    prune.end_epoch()
    assert prune.kept == {"conv1": [0, 2]}
    assert model.conv2.weight.shape == (6, 2, 3, 3)


def test_a_branch_goes_as_a_whole_and_a_stream_keeps_its_largest_channel():
    torch.manual_seed(0)
    model = Blocks()
    prune = PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), every=1)
    small(model, "one.conv1", range(4))
    small(model, "one.conv2", range(4), axis=1)
    layers = ("two.conv2", "two.shortcut.0")  # all of the last stream
    for path in layers:
        small(model, path, range(6))
    small(model, "two.conv2", [2], 7e-5)
    small(model, "fc", range(6), axis=1)
    prune.end_epoch()
    assert prune.kept["one.conv1"] == []
    assert [prune.kept[path] for path in layers] == [[2], [2]]
    assert model.fc.in_features == 1
    assert not [name for name, _ in model.named_parameters() if name.startswith("one.")]
    model(X).sum().backward()


def train(epochs, *, resume=None, breaks=(), schedule=None):
    """Train by a driver; return the state after each epoch of ``breaks`` and at the end."""
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    driver = Driver(model, schedule or Constant(), optimizer)
    prune = PruneTrain(model, optimizer, every=1, threshold=0.02)
    if resume is not None:
        driver.load_state_dict(resume["driver"])
        prune.load_state_dict(resume["prune"])
    states = []
    for epoch in range(driver.epoch, epochs):
        driver.start_epoch()
        for step in range(2):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * epoch + step))
            loss = driver.network()(x).square().mean()
            (loss + prune.penalty(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
            driver.observe(loss)
        driver.end_epoch()
        if epoch in (0, 2, 3):  # what training would do in more epochs
            small(model, "two.conv1", [epoch])
            small(model, "two.conv2", [epoch], axis=1)
        if epoch == 2:
            small(model, "one.conv1", range(4))
            small(model, "one.conv2", range(4), axis=1)
        prune.end_epoch()
        state = {"driver": driver.state_dict(), "prune": prune.state_dict()}
        states.append(saved(state, weights_only=True))
    return model, driver, states


def tensors(value):
    if isinstance(value, dict):
        return {str(k): tensors(v) for k, v in value.items()}
    return [tensors(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_resumes_exactly_after_no_cut_one_and_three():
    whole, driver, states = train(6)
    cuts = [len(state["driver"]["kept"].get("two.conv1", range(6))) for state in states]
    assert cuts == [5, 5, 4, 3, 3, 3]
    assert states[-1]["driver"]["kept"]["one.conv1"] == []
    layers = [layer.path for layer in driver.analysis.layers]
    assert layers == ["stem", "two.conv1", "two.conv2", "two.shortcut.0", "fc"]
    for state in (states[0], states[1], states[3]):
        again, resumed, _ = train(6, resume=state)
        assert driver.losses == resumed.losses
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        assert str(whole) == str(again)


def test_a_prefix_and_a_pruned_model():
    schedule = Static(epochs=5, rule=Freeze(), weak_supervision=False)
    model, driver, states = train(5, schedule=schedule)
    again, resumed, _ = train(5, schedule=schedule, resume=states[3])
    assert driver.history == resumed.history
    assert max(driver.history) > 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_loop_of_ones_own_resumes_by_the_prune_state():
    model = NETS["chain"].build()
    optimizer = torch.optim.Adam(model.parameters())
    prune = PruneTrain(model, optimizer, every=1)
    (prune.penalty(loss := model(X).square().mean()) + loss).backward()
    optimizer.step()
    for path, axis in (("conv1", 0), ("conv2", 1)):
        small(model, path, [0], axis=axis)
    prune.end_epoch()
    state = [model.state_dict(), optimizer.state_dict(), prune.state_dict()]
    state = saved(state, weights_only=True)
    fresh = NETS["chain"].build()
    second = torch.optim.Adam(fresh.parameters())
    resumed = PruneTrain(fresh, second, every=1)
    with pytest.raises(
        CheckpointError, match=r"'conv1.weight' is \[3, 3.* call load_state_dict of "
    ):
        fresh.load_state_dict(state[0])
    resumed.load_state_dict(state[2])
    fresh.load_state_dict(state[0])
    second.load_state_dict(state[1])
    assert (resumed.epoch, resumed.strength, resumed.kept) == (1, prune.strength, prune.kept)
    resumed.load_state_dict(state[2])  # again: nothing is left to be cut
    assert fresh.conv1.out_channels == 3
    with pytest.raises(CheckpointError, match="of 'conv1' channels are cut here that are not"):
        resumed.load_state_dict({**state[2], "kept": {}})


def test_a_driver_takes_up_all_or_nothing():
    _, _, states = train(1)
    torch.manual_seed(0)
    model = Blocks()
    driver = Driver(model, Static(epochs=4), torch.optim.SGD(model.parameters(), 0.05))
    before, printed = copy.deepcopy(model.state_dict()), str(model)
    captured = driver.captured
    with pytest.raises(CheckpointError, match="another schedule"):
        driver.load_state_dict(states[0]["driver"])
    assert str(model) == printed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert driver.captured is not captured
    other = Driver(NETS["chain"].build(), Constant())
    with pytest.raises(CheckpointError, match=r"cannot be cut so: kept: no layer 'two.conv1'"):
        other.load_state_dict(states[0]["driver"])


def test_a_network_made_before_a_branch_went_is_refused():
    torch.manual_seed(0)
    model = Blocks()
    network = fxlocal.transform(model, Plan(local=LocalPrefix("one", Freeze())))
    fxlocal.shrink(model, {"one.conv1": []})
    with pytest.raises(RuntimeError, match="'one' is another module"):
        network(X)


BAD = {
    "share=0.0": {"share": 0.0},
    "share=1.0": {"share": 1.0},
    "share=-0.1": {"share": -0.1},
    "share=nan": {"share": math.nan},
    "every=0": {"every": 0},
    "every=1.5": {"every": 1.5},
    "threshold=0.0": {"threshold": 0.0},
    "threshold=inf": {"threshold": math.inf},
    "share='a'": {"share": "a"},
    "threshold=None": {"threshold": None},
}


@pytest.mark.parametrize("told", BAD)
def test_refuses_what_is_out_of_range(told):
    with pytest.raises(PlanError, match=told):
        PruneTrain(NETS["chain"].build(), None, **BAD[told])


@pytest.mark.parametrize("loss", [torch.tensor(-1.0), torch.tensor(math.nan), torch.ones(3), 1.0])
def test_the_penalty_is_a_share_of_a_loss(loss):
    """Of a negative one it would make weights grow, for good."""
    prune = PruneTrain(NETS["chain"].build(), None)
    with pytest.raises(ValueError, match="share of the first batch's loss"):
        prune.penalty(loss)
    assert prune.strength is None


def test_refuses_a_model_of_which_nothing_can_be_cut():
    with pytest.raises(PlanError, match="no channel of Linear can be cut: they leave the model"):
        PruneTrain(nn.Linear(3, 4), None)


def test_local_modules_are_refused_when_their_heads_would_not_fit():
    modules = fxlocal.LocalModules(2, num_classes=5)
    model = NETS["chain"].build()
    driver = Driver(model, Constant(Plan(modules=modules)), example_inputs=(X,))
    fxlocal.shrink(model, {"conv1": [0]})
    with pytest.raises(PlanError, match="heads have the old shapes"):
        driver.start_epoch()
