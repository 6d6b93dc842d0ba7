"""Local modules and backward links, against the oracle written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import modules_oracle as oracle
from support.copies import COPIES
from support.memory import most_kept
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import ConvHead, InfoProHead, LinearHead, LocalModules, Plan, transform

HEADS = {
    "linear": LinearHead(oracle.POOL),
    "conv": ConvHead(oracle.HIDDEN, oracle.POOL),
    "infopro": InfoProHead(
        oracle.HIDDEN, oracle.POOL, oracle.WIDTH, oracle.CLASSIFICATION, oracle.RECONSTRUCTION
    ),
    "flat": LinearHead(),
}


def local(count, link=0, alpha=0.5, head="linear", **settings):
    settings = {"num_classes": 5, "balance": "blocks"} | settings
    return LocalModules(count, link, alpha, head=HEADS.get(head, head), **settings)


def make(model, modules, x):
    return transform(model, Plan(modules=modules), x)


def both(name, modules, sizes, kind="linear"):
    """The network, and for the oracle a copy of the model with heads of the same values."""
    ours, (x, y) = oracle.build(name), oracle.batch(name)
    net, theirs = make(ours, modules, x), oracle.build(name)
    return net, theirs, oracle.heads_like(heads_of(net), kind, theirs, sizes, x, y)


def heads_of(net):
    return list(net.get_submodule("fxlocal.heads"))


def forward(net, x, y, seed=0):
    torch.manual_seed(seed)
    output, loss = net(x, y)
    loss.backward()
    return output, loss


def grads(module):
    return [p.grad for p in module.parameters()]


def assert_same(ours, theirs, exact=False):
    tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(ours, theirs, **tolerances)


def assert_trains_as_by_hand(name, modules, sizes, kind="linear"):
    net, theirs, heads = both(name, modules, sizes, kind)
    mine = nn.ModuleList([fxlocal.strip(net), *heads_of(net)])
    others = nn.ModuleList([theirs, *heads])
    sgd = [torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=0.01) for m in (mine, others)]
    for seed in range(3):
        x, y = oracle.batch(name, seed)
        result = forward(net, x, y, seed)
        torch.manual_seed(seed)
        how = (modules.link, modules.alpha, F.cross_entropy, modules.weighting)
        expected = oracle.step(theirs, heads, x, y, sizes, *how)
        assert_same([*result, *grads(mine)], [*expected, *grads(others)])
        for optimizer in sgd:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(*(list(m.state_dict().values()) for m in (mine, others)))


# --- exactness -----------------------------------------------------------------------------------

NUM_UNITS = {"plain": 7, "residual": 7, "unet": 11}
KINDS = ["linear", "conv", "infopro"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("link", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("name", ["plain", "residual", "unet"])
def test_trains_as_by_hand(name, count, link):
    kind = KINDS[(count + link + list(NUM_UNITS).index(name)) % 3]  # every pair of settings once
    sizes = oracle.even(NUM_UNITS[name], count)
    assert_trains_as_by_hand(name, local(count, link, alpha=0.3, head=kind), sizes, kind)


@pytest.mark.parametrize(
    ("name", "borders", "sizes", "link"),
    [
        ("residual", ("blocks.2", "blocks.3"), [3, 1, 3], 1),  # the link is the whole module
        ("residual", ("blocks",), [1, 6], 1),
        # The skip "a" is made in a tail, and used by the next module, in its tail.
        ("unet", ("enc2", "dec1"), [2, 6, 3], 1),
        ("unet", ("enc2.1", "bottom", "dec1"), [3, 1, 4, 3], 1),
    ],
)
def test_modules_begin_at_the_named_blocks(name, borders, sizes, link):
    modules = local(len(sizes), link, alpha=0.7, balance=borders)
    assert_trains_as_by_hand(name, modules, sizes)


@pytest.mark.parametrize("link", [0, 1])
def test_a_plain_linear_head_sees_every_feature(link):
    """BackLink, section 3.1: "a simple fully-connected layer"."""
    assert_trains_as_by_hand("residual", local(3, link, head="flat"), [3, 2, 2], "flat")


def test_balance_by_memory_evens_out_what_is_saved():
    """Of 4, 8, 6, 3, 2, 1 and 2 KiB."""
    assert_trains_as_by_hand("plain", local(3, 1, balance="memory"), [2, 1, 4])


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("name", "sizes", "link", "alpha", "kind"),
    [
        ("residual", [4, 3], 1, 0.3, "infopro"),
        ("residual", [4, 3], 3, 0.7, "linear"),
        ("residual", [3, 2, 2], 2, 0.3, "conv"),
        ("plain", [2, 2, 2, 1], 2, 0.4, "infopro"),  # the link is the whole module
        ("plain", [4, 3], 2, 0.0, "linear"),
        ("deep", [3, 3, 3, 2], 3, 0.6, "linear"),
        ("dropped", [3, 2], 3, 0.5, "conv"),
        ("dropped", [2, 2, 1], 1, 0.3, "linear"),
    ],
)
def test_compound_weights_are_powers_in_a_chain(name, sizes, link, alpha, kind):
    modules = local(len(sizes), link, alpha, head=kind, weighting="compound")
    assert_trains_as_by_hand(name, modules, sizes, kind)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("link", [0, 1])
def test_dropout_has_the_same_mask_in_both_copies(alpha, link):
    assert_trains_as_by_hand("dropped", local(3, link, alpha), [2, 2, 1])


def step(net, x, y):
    """The output, the loss, the gradients and the state of one step."""
    return [*forward(net, x, y), *grads(net), *net.state_dict().values()]


@pytest.mark.parametrize(
    ("name", "link", "weighting"),
    [("residual", 1, "once"), ("unet", 2, "once"), ("unet", 2, "compound")],
)
def test_with_alpha_1_a_link_changes_nothing(name, link, weighting):
    model, (x, y) = oracle.build(name), oracle.batch(name)
    greedy = make(model, local(3), x)
    linked = make(copy.deepcopy(model), local(3, link, alpha=1.0, weighting=weighting), x)
    for a, b in zip(heads_of(linked), heads_of(greedy), strict=True):
        a.load_state_dict(b.state_dict())
    assert_same(step(linked, x, y), step(greedy, x, y), exact=True)


class Overwriting(oracle.Plain):
    def forward(self, x):
        x = self.units[0][:2](x)
        x = self.units[1](x.relu()) + x.mul_(0.5)
        return self.fc(self.units[2:](x).mean((2, 3)))


@pytest.mark.parametrize("weighting", ["once", "compound"])
def test_a_tail_may_overwrite_what_it_starts_from(weighting):
    model, (x, y) = Overwriting().double(), oracle.batch("plain")
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    modules = local(2, 1, alpha=0.0, balance=("units.2",), weighting=weighting)
    forward(make(model, modules, x), x, y)
    assert_same(grads(model.units[1:]), grads(plain.units[1:]), exact=True)


@pytest.mark.sample(7)
@pytest.mark.parametrize(("count", "weighting"), [(1, "once"), (2, "once"), (2, "compound")])
@pytest.mark.parametrize("name", [name for name in NETS if name != "multi_output"])
def test_with_alpha_0_and_a_link_to_the_beginning_it_is_back_propagation(name, count, weighting):
    """As with one module: no head counts, and no statistics move twice."""
    model, x = NETS[name].build().double(), NETS[name].inputs()[0].double()
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    output = plain(x)
    y = output.detach().flip(0).softmax(1)
    (loss := F.cross_entropy(output, y)).backward()
    border = (fxlocal.analyze(model).blocks[1].name,) if count == 2 else ()
    settings = {"num_classes": y.shape[1], "balance": border, "weighting": weighting}
    modules = local(count, count - 1, alpha=0.0, **settings)
    mine = [*forward(make(model, modules, x), x, y), *grads(model), *model.buffers()]
    assert_same(mine, [output, loss, *grads(plain), *plain.buffers()], exact=True)


# --- what a network is ---------------------------------------------------------------------------


def test_evaluation_is_the_models_own():
    model, (x, _) = oracle.build("dropped"), oracle.batch("dropped")
    net = make(model, local(2, 1), x)
    assert_same(net.eval()(x), copy.deepcopy(model).eval()(x), exact=True)


def test_only_the_heads_are_new():
    model, (x, _) = oracle.build("residual"), oracle.batch("residual")
    keys = list(model.state_dict())
    net = make(model, local(3, 1, head="conv"), x)
    found = list(net.state_dict())
    assert found[: len(keys)] == keys
    assert {key.split(".")[2] for key in found[len(keys) :]} == {"0", "1"}
    assert all(key.startswith("fxlocal.heads.") for key in found[len(keys) :])
    assert fxlocal.strip(net) is model
    assert list(model.state_dict()) == keys
    parameters = [*model.parameters(), *(p for h in heads_of(net) for p in h.parameters())]
    assert {id(p) for p in net.parameters()} == {id(p) for p in parameters}


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_trains_alike(copied):
    model, (x, y) = oracle.build("dropped"), oracle.batch("dropped")
    net = make(model, local(3, 1, head="conv"), x)
    other = copied(net)
    assert_same(step(other, x, y), step(net, x, y), exact=True)  # so they share no statistics
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}


def test_every_head_loss_and_backward_has_a_node():
    model, (x, y) = oracle.build("unet"), oracle.batch("unet")
    net = make(model, local(3, 1), x)
    expected = step(copy.deepcopy(net), x, y)
    wanted = {f"{what}_{k}" for what in ("head", "loss", "backward") for k in (0, 1)}
    assert wanted <= {node.name for node in net.graph.nodes}
    net.graph.eliminate_dead_code()
    net.recompile()
    names = [node.name for node in net.graph.nodes]
    assert wanted <= set(names)
    assert any(name.startswith("cut_") for name in names)
    assert any(name.endswith("_linked") for name in names)
    assert_same(step(net, x, y), expected, exact=True)
    owners = [n.meta["fxlocal_stage"] for n in net.graph.nodes if "fxlocal_stage" in n.meta]
    assert owners == sorted(owners)
    assert set(owners) == {0, 1, 2}


# --- memory, precision, scaling, a user's own parts ----------------------------------------------


def test_modules_keep_less_for_backward_and_summed_losses_keep_all():
    net, theirs, heads = both("residual", local(4, balance="memory"), [2, 1, 1, 3])
    x, y = oracle.batch("residual")
    plain = most_kept(lambda: F.cross_entropy(theirs(x), y), theirs.parameters())
    ours = most_kept(lambda: net(x, y)[1], net.parameters())
    weights = [p for m in (theirs, *heads) for p in m.parameters()]
    summed = most_kept(lambda: oracle.summed(theirs, heads, x, y, [2, 1, 1, 3]), weights)
    assert ours < 0.5 * plain
    assert summed >= 0.95 * plain


def test_autocast():
    model, (x, y) = oracle.build("residual").float(), oracle.batch("residual")
    x = x.float()
    net = make(model, local(3, 1, head="conv"), x)
    exact = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        output, loss = net(x, y)
    loss.backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    _, wanted = forward(exact, x, y)
    torch.testing.assert_close(loss.float(), wanted, rtol=0.05, atol=0.05)
    mine, other = (torch.cat([g.flatten() for g in grads(n)]) for n in (net, exact))
    assert F.cosine_similarity(mine, other, dim=0) > 0.95


@pytest.mark.parametrize("link", [0, 1])
def test_micro_batches_add_up_to_the_mean(link):
    x, y = oracle.batch("plain", size=8)
    net = make(oracle.build("plain"), local(3, link), x)
    wanted = [0.0] * len(list(net.parameters()))
    for half in (slice(4), slice(4, 8)):
        forward(other := copy.deepcopy(net), x[half], y[half])
        wanted = [total + p.grad / 2 for total, p in zip(wanted, other.parameters(), strict=True)]
    fxlocal.scale_losses(net, 0.5)
    for half in (slice(4), slice(4, 8)):
        (net(x[half], y[half])[1] / 2).backward()
    assert_same(grads(net), wanted)


def test_grad_scaler_and_clipping():
    x, y = oracle.batch("plain")
    net = make(oracle.build("plain"), local(3, 1), x)
    forward(exact := copy.deepcopy(net), x, y)
    wanted = grads(exact)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fxlocal.scale_losses(net, scaler.get_scale())
    scaler.scale(net(x, y)[1]).backward()
    scaler.unscale_(optimizer)
    assert_same(grads(net), wanted)

    length = torch.stack([g.norm() for g in wanted]).norm()
    found = nn.utils.clip_grad_norm_(net.parameters(), length.item() / 2)
    assert_same(found, length)
    torch.testing.assert_close([2 * p.grad for p in net.parameters()], wanted, rtol=1e-5, atol=0)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.step(optimizer)
    for p, old, g in zip(net.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.05 * g, rtol=1e-5, atol=1e-8)


class Own(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(shape[1], 5)  # cast to the model's dtype

    def forward(self, features, x=None, y=None, loss=None):
        logits = self.fc(features.amax((2, 3)))
        return loss(logits, y) if loss else logits  # with a loss for the oracle


def test_own_head_and_loss():
    def half_of_it(output, target):
        return 0.5 * F.cross_entropy(output, target, label_smoothing=0.1)

    model, theirs, (x, y) = oracle.build("plain"), oracle.build("plain"), oracle.batch("plain")
    modules = local(3, 1, head=lambda shape: Own(shape), num_classes=None, loss=half_of_it)
    net = make(model, modules, x)
    heads = copy.deepcopy(heads_of(net))
    assert [tuple(head.shape) for head in heads] == [(4, 6, 4, 4), (4, 8, 2, 2)]
    result = forward(net, x, y)
    assert_same(result, oracle.step(theirs, heads, x, y, [3, 2, 2], 1, 0.5, half_of_it))
    assert_same(grads(net), grads(nn.ModuleList([theirs, *heads])))
