"""A delta is of the input that the layer met, however that is overwritten after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal import Hebbian, LocalPrefix, Plan, transform


def handed_on(x):
    return x


fx.wrap("handed_on")
WAYS = {
    "method": lambda net, x: x.clamp_(0),
    "slice": lambda net, x: x[:, :].relu_(),
    "view": lambda net, x: x.view(-1).clamp_(0),
    "transposed": lambda net, x: x.transpose(1, 2).clamp_(0),
    "chunks": lambda net, x: torch.chunk(x, 2, 1)[1].clamp_(0),
    "unbound": lambda net, x: x.unbind(1)[2].clamp_(0),
    "narrowed": lambda net, x: x.narrow(1, 0, 4).clamp_(0),
    "flattened, by a module": lambda net, x: net.relu(x.flatten(1)),
    "cast to what it is": lambda net, x: x.float().clamp_(0),
    "data": lambda net, x: x.data.clamp_(0),
    "identity": lambda net, x: net.same(x).clamp_(0),
    "idle dropout": lambda net, x: F.dropout(x, 0.5, False).clamp_(0),
    "dropout of nothing": lambda net, x: net.drop(x).clamp_(0),
    "tensor of a tensor": lambda net, x: torch.as_tensor(x).clamp_(0),
    "array of a tensor": lambda net, x: torch.asarray(x).clamp_(0),
    "a function of the user's": lambda net, x: handed_on(x).clamp_(0),
    "out": lambda net, x: torch.clamp(x, 0, out=x),
    "one of two outs": lambda net, x: torch.topk(x * 2, 8, out=(x, x.argsort())),
}


class Net(nn.Module):
    """Uses the input of a convolution again, overwritten by ``way`` or as a new value."""

    def __init__(self, way, base=False):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.same, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.0)
        self.fc, self.way, self.base = nn.Linear(4, 2), way, base

    def forward(self, x):
        x = self.stem(x)
        out = self.conv(x[:, :] if self.base else x)
        if self.way is not None:
            self.way(self, x)
        out = out + x
        return self.fc(out.mean((2, 3)))


def delta_of(model, overwrite):
    """The step of the convolution, whose post is the sum; by hand."""
    x, conv = model.stem(X), model.conv
    pre, out = x.clone(), conv(x)
    if overwrite:
        model.way(model, x)
    post = out + x
    delta = torch.nn.grad.conv2d_weight(pre, conv.weight.shape, post, padding=1)
    return 0.1 * delta / delta.norm()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.sample(12)
@pytest.mark.parametrize("base", [False, True], ids=["of the input", "of what it is a view of"])
@pytest.mark.parametrize("way", WAYS)
def test_the_delta_uses_the_input_that_the_layer_met(way, base):
    torch.manual_seed(0)
    model = Net(WAYS[way], base)
    before = model.conv.weight.detach().clone()
    with torch.no_grad():
        wanted = before + delta_of(model, overwrite=True)
    network = transform(model, Plan(local=LocalPrefix(until="fc", rule=Hebbian(0.1))))
    network(X)
    torch.testing.assert_close(model.conv.weight.detach(), wanted)


def test_an_input_that_stays_is_not_copied():
    network = transform(Net(None), Plan(local=LocalPrefix(until="fc", rule=Hebbian(0.1))))
    assert "clone" not in network.code
