"""Weights that hooks of torch's make before each call, where the graph is torch.export's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxlocal


class Looped(nn.Module):
    """One whose loop over a size of the batch stops symbolic tracing."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.last = layer, nn.Linear(8, 2)

    def forward(self, x):
        for _ in range(x.ndim):
            x = x + x.numel() / x.shape[0]
        return self.last(self.first(x).relu())


def weight_norm(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


HOOKS = {"weight_norm": weight_norm, "spectral_norm": nn.utils.spectral_norm, "prune": masked}


def build(name):
    torch.manual_seed(0)
    layer = nn.Linear(4, 8)
    HOOKS[name](layer)
    return Looped(layer)


@pytest.mark.parametrize("until", [None, "last"])
@pytest.mark.parametrize("name", HOOKS)
def test_the_network_computes_what_the_model_does(name, until, recwarn):
    model, source, x = build(name), build(name), torch.randn(3, 4)
    recwarn.clear()
    local = until and fxlocal.LocalPrefix(until=until, rule=fxlocal.Freeze())
    net = fxlocal.transform(model, fxlocal.Plan(local=local), x)
    assert net.meta["captured_with"] == "by torch.export"
    assert not [str(w.message) for w in recwarn if "hooks" in str(w.message)]
    for batch in (x, torch.randn(5, 4)):  # a power iteration moves buffers
        ours, theirs = net(batch), source(batch)
        assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = dict(source.named_parameters())
    for path, parameter in model.named_parameters():
        if until and path.startswith("first"):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected[path].grad)
    assert all(map(torch.equal, model.buffers(), source.buffers()))
    assert torch.equal(net.eval()(x), source.eval()(x))


def test_a_local_update_moves_what_the_mask_is_laid_on():
    model, source, x = build("prune"), build("prune"), torch.randn(3, 4)
    rule = fxlocal.Hebbian(rate=0.1, computed=True)
    net = fxlocal.transform(
        model, fxlocal.Plan(local=fxlocal.LocalPrefix(until="last", rule=rule)), x
    )
    net(x)
    with torch.no_grad():  # the delta by hand, through the mask
        seen = x + 4.0 + 4.0
        delta = source.first(seen).mT @ seen
        moved = delta * source.first.weight_mask
    step = (model.first.weight_orig - source.first.weight_orig).detach()
    assert step.abs().sum() > 0
    torch.testing.assert_close(step / step.norm(), moved / moved.norm())


class Remembering(Looped):
    """One that assigns a tensor itself, beside the hook."""

    def forward(self, x):
        self.seen = x * 2
        return super().forward(x)


def test_what_the_model_assigns_itself_is_refused_still():
    model = build("prune")
    model.__class__ = Remembering
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxlocal.CaptureError, match="assigns 'seen'"):
        fxlocal.capture(model, torch.randn(3, 4))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
