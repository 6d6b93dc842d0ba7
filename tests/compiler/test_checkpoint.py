"""Plans with checkpointed stages: beside their other parts, compiled, copied, in a driver."""

import copy
import warnings

import pytest
import torch
from support import laws
from support.checkpoints import IMAGES, assert_trains_alike, both, checkpointed
from support.copies import COPIES
from support.drivers import run
from support.memory import kept_bytes
from support.nets import NETS
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import (
    Checkpoint,
    Driver,
    Hebbian,
    LocalPrefix,
    NoEffectWarning,
    Plan,
    Random,
    TopK,
    Zero,
    diff_graphs,
)
from fxlocal.schedules import Constant


@pytest.mark.sample(3)
@pytest.mark.parametrize("until", [1, 2])
@pytest.mark.parametrize("name", ["residual", "unet", "preactivation"])
def test_a_local_prefix_learns_once_and_is_never_computed_again(name, until):
    plan = Plan(local=LocalPrefix(until, Hebbian(0.01)))
    network, ours, theirs = both(NETS[name].model, checkpointed(3, local=plan.local))
    assert_trains_alike(ours, network, theirs, fxlocal.transform(theirs, plan))


def test_a_stage_that_straddles_the_boundary_is_computed_again_behind_it():
    local = LocalPrefix("conv2", Hebbian(0.01))
    plan = Plan(local, checkpoint=Checkpoint(2, ("fc",)))
    network = fxlocal.transform(NETS["chain"].build(), plan)
    text = fxlocal.format_graph(network)
    before, again = text.split("stage 0, computed again in backward:\n")
    assert "local_update" in before and "no_grad" in before
    assert again.startswith("%conv2 = call_module conv2(%detach)")
    assert "update" not in again


def test_nothing_is_computed_again_where_nothing_learns_by_back_propagation():
    plan = Plan(LocalPrefix("fc"), checkpoint=Checkpoint(2, ("conv3",)))
    with pytest.warns(NoEffectWarning, match="insert_checkpoints"):
        network = fxlocal.transform(NETS["chain"].build(), plan)
    assert "run_checkpointed" not in network.code


@pytest.mark.parametrize("method", [Zero(), Random(), TopK(3, force=True)])
def test_weight_gradients_are_approximated_as_without(method):
    grads = {"conv1": method, "conv2": method}
    network, ours, theirs = both(NETS["chain"].model, checkpointed(3, weight_grads=grads))
    plain = fxlocal.transform(theirs, Plan(weight_grads=grads))
    assert_trains_alike(ours, network, theirs, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint_of_the_users_it_is_exact_but_local_updates_are_refused(reentrant):
    network, ours, theirs = both(NETS["chain"].model, checkpointed(3))
    for net in (lambda x: checkpoint(network, x, use_reentrant=reentrant), theirs):
        laws.loss_of(net(IMAGES.clone().requires_grad_())).backward()
    laws.assert_equal(laws.gradients(ours), laws.gradients(theirs), "gradient")
    learning = fxlocal.transform(ours, checkpointed(3, local=LocalPrefix(1)))
    with pytest.raises(RuntimeError, match="Call the network outside"):
        checkpoint(learning, IMAGES.clone().requires_grad_(), use_reentrant=reentrant)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("residual", "unet")]


@pytest.mark.parametrize("name", ["preactivation", *SLOW])
def test_compiled_is_uncompiled(name):
    laws.l11_compiled_is_uncompiled(NETS[name].build(), NETS[name].inputs(), checkpointed(3))


@pytest.mark.slow
def test_compiled_it_keeps_less():
    kept = []
    for plan in (Plan(), checkpointed(3)):
        torch._dynamo.reset()
        network = fxlocal.transform(NETS["residual"].build(), plan)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        kept.append(kept_bytes(compiled, [IMAGES], network.state_dict().values()))
    assert kept[1] < 0.6 * kept[0]


# --- what a network goes through -----------------------------------------------------------------


@pytest.mark.parametrize("twin", [copy.copy, *COPIES])
def test_copies_are_checkpointed_too(twin):
    network, ours, _ = both(NETS["unet"].model, checkpointed(3))
    again = twin(network)
    assert again.code == network.code and diff_graphs(network, again) == ""
    assert list(again.state_dict()) == list(ours.state_dict())
    laws.assert_equal(laws.step(again, (IMAGES,)), laws.step(network, (IMAGES,)), "output")


def test_a_step_is_verified_and_shows_what_is_kept():
    x = NETS["chain"].inputs()[0]
    network = fxlocal.transform(NETS["chain"].build(), checkpointed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, plain = fxlocal.verify(network, x), fxlocal.verify(NETS["chain"].build(), x)
    assert ours.loss == plain.loss
    pairs = list(zip(ours.layers, plain.layers, strict=True))
    assert all(a.gradient == b.gradient and a.moved == b.moved for a, b in pairs)
    assert [a.saved_bytes < b.saved_bytes for a, b in pairs] == [True, True, False, False]


def test_a_driver_resumes_exactly():
    def driver():
        model = NETS["dropout"].build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return Driver(model, Constant(checkpointed(2)), optimizer)

    def train(driver, epochs):
        return run(driver, epochs, (IMAGES,), steps=1)

    first, second = driver(), driver()
    train(first, 1)
    state = copy.deepcopy(first.state_dict())
    losses = train(first, 2)
    second.load_state_dict(state)
    assert train(second, 2) == losses
    laws.assert_equal(second.model.state_dict(), first.model.state_dict(), "state")
