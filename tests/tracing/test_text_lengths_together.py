"""Texts of other lengths where what is asked is about several sizes, or about those of others."""

import copy

import pytest
import torch
from support import laws
from test_text_lengths import PLAN, Text, ids, mask, steps_agree
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Plan


def made(body, **modules):
    torch.manual_seed(0)
    model = Text(body)
    for name, module in modules.items():
        setattr(model, name, module.requires_grad_(False))
    return model, copy.deepcopy(model)


def agree(net, model, eager, *batch):
    for one in (model, eager):
        one.zero_grad()
    steps_agree(net, model, eager, *batch)
    for (name, mine), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
        laws.assert_equal(mine, theirs, name)


# --- questions of several sizes -------------------------------------------------------------------


def by_channel(net, h):
    return net.norm(h.mT).mT


def flattened(net, h):
    return net.norm(h.reshape(-1, 6)).view(h.shape)


def halved(net, h):
    return net.norm(net.conv(h.mT)).mT


def with_other(net, h, other):
    return net.norm(torch.cat([h, net.embed(other)], 1).mT).mT


def unless_alone(net, h):
    return h * 2 if h.shape[0] * h.shape[1] > 1 else h


NORMED = {
    "a batch norm": (by_channel, {"norm": nn.BatchNorm1d(6)}, 2),
    "a batch norm of rows": (flattened, {"norm": nn.BatchNorm1d(6)}, 2),
    "a group norm": (by_channel, {"norm": nn.GroupNorm(2, 6)}, 1),
    "a convolution": (
        halved,
        {"norm": nn.BatchNorm1d(6), "conv": nn.Conv1d(6, 6, 3, stride=2, padding=1)},
        3,
    ),
    "an unpadded one": (halved, {"norm": nn.BatchNorm1d(6), "conv": nn.Conv1d(6, 6, 3)}, 4),
    "the model": (unless_alone, {}, 2),
}


@pytest.mark.parametrize("name", NORMED)
def test_what_has_one_answer_for_all_but_the_least_bounds_lengths(name):
    body, modules, least = NORMED[name]
    model, eager = made(body, **modules)
    net = fxlocal.transform(model, PLAN, ids(3, 9))
    for rows, length in ((3, 9), (1, least), (2, 14), (1, 5), (40, 60)):
        agree(net, model, eager, ids(rows, length))
    if least > 1:
        with pytest.raises(RuntimeError, match=f" {least} to .* in dimension 1"):
            net(ids(1, least - 1))


def test_a_batch_norm_of_two_texts_takes_one_token_of_each():
    model, eager = made(with_other, norm=nn.BatchNorm1d(6))
    net = fxlocal.transform(model, PLAN, ids(3, 9), ids(3, 7))
    for rows, length, other in ((3, 9, 7), (1, 1, 1), (2, 5, 12)):
        agree(net, model, eager, ids(rows, length), ids(rows, other))


def many(net, h):
    return h * 2 if h.shape[0] * h.shape[1] > 2000 else h


def not_few(net, h):
    return h * 2 if h.shape[0] * h.shape[1] > 20 else h


def longer(net, h):
    return h * 2 if h.shape[1] > h.shape[0] else h


def uneven(net, h):
    return h * 2 if h.numel() % 4 else h


ASKED = {
    "many": (many, (2, 9), (223, 9), "0 to 222 in dimension 0"),
    "not few": (not_few, (3, 9), (2, 9), "3 to any in dimension 0"),
    "longer": (longer, (3, 9), (9, 9), "0 to 8 in dimension 0"),
    "uneven": (uneven, (3, 9), (2, 9), "a size of 3 in dimension 0"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_has_another_answer_for_others_fixes_the_length(name):
    body, example, wrong, told = ASKED[name]
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(*example))
    agree(net, model, eager, ids(*example))
    with pytest.raises(RuntimeError, match="a size of 9 in dimension 1"):
        net(ids(example[0], 8))
    with pytest.raises(RuntimeError, match=told):
        net(ids(*wrong))


def either(net, h):
    return h * 2 if h.shape[0] + h.shape[1] > 5 else h


def test_a_sum_that_the_model_asks_for_bounds_it():
    model, eager = made(either)
    net = fxlocal.transform(model, PLAN, ids(3, 9))
    for rows, length in ((3, 9), (1, 5), (7, 40)):
        agree(net, model, eager, ids(rows, length))
    with pytest.raises(RuntimeError, match=" 5 to any in dimension 1"):
        net(ids(1, 4))


# --- two tokens -----------------------------------------------------------------------------------


def predicted(net, h, labels):
    return h * F.cross_entropy(h[:, :-1].reshape(-1, 6), labels[:, 1:].reshape(-1) % 6)


def predicted_by_channel(net, h, labels):
    return h * F.cross_entropy(h[:, :-1].mT, labels[:, 1:] % 6)


def changes(net, h, labels):
    steps = (h[:, 1:] - h[:, :-1]).flatten(0, 1)
    return h + steps.view(h.shape[0], -1, 6).mean(1, keepdim=True) * labels[..., None]


def likely(net, h, labels):
    chances = h[:, :-1].log_softmax(-1).view(-1, 6)
    return h + F.nll_loss(chances, labels[:, 1:].reshape(-1) % 6)


@pytest.mark.parametrize("body", [predicted, predicted_by_channel, changes, likely])
def test_two_tokens_of_which_one_is_left_out_are_a_text(body):
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(3, 9), ids(3, 9))
    for rows, length in ((3, 9), (3, 2), (1, 2), (2, 3), (1, 9)):
        agree(net, model, eager, ids(rows, length), ids(rows, length))


def squeezed(net, h, labels):
    return h[:, 1:] + labels[:, 1:, None] + h[:, 1:].sum(2).squeeze()[..., None]


def squeezed_by_length(net, h, labels):
    return h[:, 1:] + labels[:, 1:, None] + h[:, 1:].sum(2).squeeze(1)[..., None]


def squeezed_in_a_region(net, h, labels):
    with torch.no_grad():
        sums = h[:, 1:].sum(2).squeeze()
    return h[:, 1:] + labels[:, 1:, None] + sums.flatten()[0]


@pytest.mark.parametrize("body", [squeezed, squeezed_by_length, squeezed_in_a_region])
def test_two_tokens_of_which_a_squeeze_drops_one_are_refused(body):
    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(3, 9), ids(3, 9))
    for rows, length in ((3, 9), (2, 3)):
        agree(net, model, eager, ids(rows, length), ids(rows, length))
    with pytest.raises(RuntimeError, match=" 3 to any in dimension 1"):
        net(ids(2, 2), ids(2, 2))


# --- embeddings beside masks ----------------------------------------------------------------------


def viewed(net, h, mask):
    keys = mask.view(h.shape[0], -1)[:, None, None, :]
    q = h[:, None]
    return F.scaled_dot_product_attention(q, q, q, attn_mask=keys)[:, 0]


def padded(net, h, mask):
    if (short := h.shape[1] - mask.shape[1]) > 0:
        mask = F.pad(mask, (0, short))
    if mask.shape[1] > h.shape[1]:
        mask = mask[:, : h.shape[1]]
    return h * mask[..., None]


def flat(net, h, mask):
    rows = h.flatten(0, 1) * mask.flatten()[:, None]
    return rows.view(h.shape) + rows.view(mask.shape[0], -1, 6)


def embedded(rows, length):
    return torch.rand(rows, length, 6)


@pytest.mark.parametrize("body", [viewed, padded, flat])
@pytest.mark.parametrize("example", [(3, 9), (3, 6)], ids=str)  # 6 are the features, too
def test_embeddings_are_as_long_as_their_mask(body, example):
    model, eager = made(body, embed=nn.Identity())
    net = fxlocal.transform(model, PLAN, embedded(*example), mask(*example))
    for rows, length in (example, (3, 5), (1, 2), (4, 12)):
        agree(net, model, eager, embedded(rows, length), mask(rows, length))
    told = "must match" if body is flat else r"is the 7 in dimension 1 of one of shape \(2, 7"
    with pytest.raises(RuntimeError, match=told):
        net(embedded(2, 7), mask(2, 6))


def across(net, h, other):
    return F.scaled_dot_product_attention(h, other, other)


def test_features_that_are_as_many_by_chance_need_not_be():
    model, eager = made(across)
    net = fxlocal.transform(model, PLAN, ids(3, 9), embedded(3, 9))
    for length, other in ((9, 9), (5, 9), (12, 4)):
        agree(net, model, eager, ids(2, length), embedded(2, other))


# --- images that are as wide as a text is long ----------------------------------------------------


def with_patches(net, h, image):
    patches = net.conv(image).flatten(2).mT
    return torch.cat([h, patches + net.places(net.table[:, :4])], 1)


def with_pixels(net, h, image):
    return h + net.pixels(net.conv(image).flatten(1))[:, None]


def with_windows(net, h, image):
    windows = image.view(image.shape[0], 3, 2, -1, 2, 4).mean((1, 3, 5)).flatten(1)
    return h + windows.sum(1)[:, None, None]


@pytest.mark.parametrize("body", [with_patches, with_pixels, with_windows])
@pytest.mark.parametrize("length", [8, 9])
def test_images_that_are_as_wide_as_a_text_is_long_fix_themselves_alone(body, length):
    model, eager = made(body, conv=nn.Conv2d(3, 6, 4, 4), pixels=nn.Linear(24, 6))
    net = fxlocal.transform(model, PLAN, ids(3, length), torch.rand(3, 3, 8, 8))
    for rows, other in ((3, length), (2, 5), (1, 14)):
        agree(net, model, eager, ids(rows, other), torch.rand(rows, 3, 8, 8))
    with pytest.raises(RuntimeError, match="in dimension 2"):
        net(ids(2, 5), torch.rand(2, 3, 12, 12))


def test_masks_of_pairs_are_as_long_as_their_text():
    def body(net, h, pairs):
        q = h[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=pairs)[:, 0]

    def pairs(rows, length):
        return torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)

    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(3, 9), pairs(3, 9))
    for rows, length in ((3, 9), (2, 5), (1, 14)):
        agree(net, model, eager, ids(rows, length), pairs(rows, length))


# --- sizes that turn out to be another's ----------------------------------------------------------


def test_what_was_asked_of_a_size_before_it_was_tied_holds():
    def body(net, h, weights):
        h = h * 2 if weights.shape[1] % 3 == 0 else h
        return h * weights[..., None]

    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(4, 8), torch.rand(4, 8))
    for rows, length in ((4, 8), (3, 7)):
        agree(net, model, eager, ids(rows, length), torch.rand(rows, length))
    with pytest.raises(RuntimeError, match="7 to 8 in dimension 1"):
        net(ids(4, 6), torch.rand(4, 6))


def test_one_row_does_not_stand_for_a_batch_of_which_the_model_may_ask():
    def body(net, h, mask):
        return h * mask[..., None] / h.shape[0]

    model, eager = made(body)
    net = fxlocal.transform(model, PLAN, ids(3, 9), mask(3, 9))
    agree(net, model, eager, ids(1, 9), mask(1, 9))
    with pytest.raises(RuntimeError, match="is the 1 in dimension 0 of one of shape"):
        net(ids(1, 9), mask(3, 9))
    with pytest.raises(RuntimeError, match="is the 3 in dimension 0 of one of shape"):
        net(ids(3, 9), mask(1, 9))


def test_a_flag_beside_sizes_that_have_to_be_tried():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, scale, doubled=True):
            if scale.shape[0] != x.shape[0]:
                raise ValueError("rows")
            y = self.last(self.first(x) * scale[:, None, None]).mean(1, keepdim=True).squeeze()
            return (2 * y if doubled else y,)

    model, x = Flagged(), torch.randn(3, 5, 6)
    net = fxlocal.transform(model, Plan(), x=x, scale=torch.rand(3), doubled=False)
    for rows in (3, 2):
        given = {"x": torch.randn(rows, 5, 6), "scale": torch.rand(rows), "doubled": False}
        assert torch.equal(net(**given)[0], model(**given)[0])


def test_a_question_of_how_many_values_are_masked():
    class Placed(nn.Module):
        """As models of sounds and text: features go to the places of a token."""

        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(20, 4), nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, ids, sounds):
            h, features = self.embed(ids), self.a(sounds).reshape(-1, 4)
            mask = (ids == 7)[..., None].expand_as(h)
            torch._check(h[mask].numel() == features.numel(), lambda: "not as many")
            return self.b(h.masked_scatter(mask, features))

    def batch(rows):
        return torch.tensor([[8, 7, 7, 9, 10]] * rows), torch.randn(rows, 2, 6)

    model = Placed()
    net = fxlocal.transform(model, Plan(), *batch(3))
    for given in (batch(3), batch(2)):
        laws.assert_equal(net(*given), model(*given), "output")
