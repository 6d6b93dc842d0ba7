"""Local modules learn from soft targets: MixUp, CutMix, smoothed labels."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import laws
from torch import nn

import fxlocal
from fxlocal import ConvHead, InfoProHead, LinearHead, LocalModules, Plan
from fxlocal.runtime.compile import ByModule

N, C = 6, 3
IMAGES, LABELS = torch.randn(N, 2, 8, 8), torch.tensor([0, 1, 2, 1, 0, 2])
HARD = F.one_hot(LABELS, C).float()
SMOOTH = HARD * 0.9 + 0.1 / C
MIXED = 0.7 * HARD + 0.3 * HARD.roll(1, 0)  # CutMix too: probabilities of two labels


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, C)
    )


def made(**more):
    torch.manual_seed(1)
    plan = Plan(modules=LocalModules(2, num_classes=C, balance=("2",), **more))
    return fxlocal.transform(model(), plan, IMAGES)


def kl(scores, target):
    return F.kl_div(F.log_softmax(scores, -1), target, reduction="batchmean")


def mixed(scores, target):
    """As timm and torchvision train: two labels and how much of each."""
    one, other, share = target
    return share * F.cross_entropy(scores, one) + (1 - share) * F.cross_entropy(scores, other)


SOFT_CE = nn.CrossEntropyLoss(label_smoothing=0.1)
CASES = {
    "probabilities": ({}, MIXED, F.cross_entropy),
    "smoothed by hand": ({}, SMOOTH, F.cross_entropy),
    "label_smoothing": (
        {"loss": partial(F.cross_entropy, label_smoothing=0.1)},
        LABELS,
        partial(F.cross_entropy, label_smoothing=0.1),
    ),
    "a module with label_smoothing": ({"loss": SOFT_CE}, LABELS, SOFT_CE),
    "label_smoothing of probabilities": ({"loss": SOFT_CE}, MIXED, SOFT_CE),
    "divergence": ({"loss": kl}, SMOOTH, kl),
    "pair of labels": ({"loss": mixed}, (LABELS, LABELS.roll(1), 0.7), mixed),
    "binary": (
        {"loss": F.binary_cross_entropy_with_logits},
        MIXED,
        F.binary_cross_entropy_with_logits,
    ),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("head", [LinearHead(), ConvHead(hidden=8), InfoProHead(hidden=8, width=4)])
@pytest.mark.parametrize("case", CASES)
def test_each_module_learns_from_the_soft_target(case, head):
    more, target, loss_of = CASES[case]
    net = made(head=head, **more)
    eager, heads = copy.deepcopy(net.source_model), copy.deepcopy(net.fxlocal.heads)
    output, loss = net(IMAGES, target)
    loss.backward()
    hidden = eager[:2](IMAGES)
    scores = heads[0].classifier(hidden) if isinstance(head, InfoProHead) else heads[0](hidden)
    local = loss_of(scores, target)
    if isinstance(head, InfoProHead):
        local = local + F.mse_loss(heads[0].decoder(hidden), IMAGES)
    local.backward()
    last = eager[2:](hidden.detach())
    last_loss = loss_of(last, target)
    last_loss.backward()
    assert torch.equal(output, last)
    assert torch.equal(loss, last_loss)
    laws.assert_equal(laws.gradients(net.source_model), laws.gradients(eager), "gradient")
    assert not fxlocal.verify(net, IMAGES, target).unmet


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [case for case in CASES if case != "divergence"])
def test_compiled_one_by_one_they_learn_alike(case):
    more, target, _ = CASES[case]
    net, other = made(**more), made(**more)
    _, loss = ByModule(net, {"backend": "eager"})(IMAGES, target)
    _, expected = other(IMAGES, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_maps_of_probabilities_fit_scores_for_each_pixel():
    torch.manual_seed(0)
    unet = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, C, 3, padding=1))
    plan = Plan(modules=LocalModules(1, num_classes=C))
    net = fxlocal.transform(unet, plan, IMAGES)
    target = torch.rand(N, C, 8, 8).softmax(1)
    output, loss = net(IMAGES, target)
    assert torch.equal(loss, F.cross_entropy(output, target))


@pytest.mark.parametrize(
    "target", [MIXED[:, :2], MIXED[:3], MIXED.T.contiguous(), MIXED[..., None]]
)
def test_probabilities_that_do_not_fit_are_refused(target):
    with pytest.raises(ValueError, match=r"needs probabilities of shape \(6, 3\)"):
        made()(IMAGES, target)
