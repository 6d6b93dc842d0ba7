"""A network is called as its model is: by keyword, with optional inputs left out, through *args."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.keyword_nets import (
    BOTH_WAYS,
    CASES,
    EACH,
    EXPORTS_KEYWORDS,
    IDS,
    LABELS,
    MASK,
    PREFIX,
    Image,
    Net,
    Text,
    Wrapper,
    X,
    build,
)

import fxlocal
from fxlocal import Plan
from fxlocal.schedules import Constant


def test_which_cases_are_exported():
    for case in CASES:
        for by_shape in (False, EXPORTS_KEYWORDS or not case.startswith("wrapped")):
            model, batch = build(case, by_shape)
            captured = fxlocal.capture(model, **batch)
            assert ("captured_with" in captured.meta) == by_shape, case


@pytest.mark.sample(6)
@BOTH_WAYS
@EACH
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_by_keyword_is_taken_as_the_model_takes_it(case, by_shape, training):
    model, batch = build(case, by_shape)
    eager = copy.deepcopy(model).train(training)
    net = fxlocal.transform(model, Plan(), **batch).train(training)
    theirs, ours = eager(**batch), net(**batch)
    laws.assert_equal(laws.tensors(ours), laws.tensors(theirs), "output")
    for output in (ours, theirs):
        sum(laws.tensors(output)).sum().backward()
    laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")


@pytest.mark.sample(5)
@BOTH_WAYS
@EACH
def test_a_prefix_is_cut_and_verified_with_such_a_batch(case, by_shape):
    model, batch = build(case, by_shape)
    net = fxlocal.transform(model, PREFIX, **batch)
    report = fxlocal.verify(net, **batch)
    assert [layer.has_gradient for layer in report.layers] == [False, True, True]
    assert not report.unmet
    assert all(layer.has_gradient for layer in fxlocal.verify(model, **batch).layers)


@BOTH_WAYS
def test_the_signature_is_the_models_own(by_shape):
    model, batch = build("text", by_shape)
    net = fxlocal.transform(model, Plan(), **batch)
    told = "(ids=None, mask=None, types=None, embedded=None, labels=None, scale=1.0)"
    assert str(inspect.signature(net.forward)) == told
    laws.assert_equal(net(IDS, MASK, None, None, LABELS)[1:], net(**batch)[1:], "output")
    laws.assert_equal(net(IDS, MASK, labels=LABELS)[1:], net(**batch)[1:], "output")


@BOTH_WAYS
def test_what_was_given_by_position_may_be_given_by_keyword(by_shape):
    net = fxlocal.transform(Text(by_shape), Plan(), IDS, MASK, None, None, LABELS)
    theirs = Text(by_shape)(IDS, MASK, labels=LABELS)
    for ours in (net(ids=IDS, mask=MASK, labels=LABELS), net(IDS, MASK, None, None, LABELS)):
        laws.assert_equal(laws.tensors(ours), laws.tensors(theirs), "output")


@BOTH_WAYS
def test_in_evaluation_any_subset_is_passed_on(by_shape):
    model, batch = build("text", by_shape)
    net = fxlocal.transform(model, Plan(), **batch).eval()
    assert torch.equal(net(IDS), model(IDS))
    assert torch.equal(net(mask=MASK, ids=IDS), model(IDS, MASK))
    assert torch.equal(net(ids=IDS, types=IDS[:, 0]), model(IDS, types=IDS[:, 0]))
    wrapped, batch = build("wrapped text", by_shape)
    net = fxlocal.transform(wrapped, Plan(), **batch).eval()
    assert torch.equal(net(ids=IDS), wrapped(ids=IDS))
    image, batch = build("image", by_shape)
    net = fxlocal.transform(image, Plan(), **batch).eval()
    assert torch.equal(net(X, True, shift=X), image(X, True, shift=X))


@BOTH_WAYS
def test_in_training_another_subset_is_refused_by_name(by_shape):
    model, batch = build("text", by_shape)
    net = fxlocal.transform(model, Plan(), **batch)
    with pytest.raises(RuntimeError, match="no 'labels': the graph was captured with it"):
        net(IDS, MASK)
    with pytest.raises(RuntimeError, match="captured with None, which is fixed"):
        net(types=IDS[:, 0], **batch)
    with pytest.raises(RuntimeError, match=r"captured with 1\.0, which is fixed"):
        net(scale=2.0, **batch)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_mask'"):
        net(head_mask=X, **batch)
    model, batch = build("image", by_shape)
    net = fxlocal.transform(model, Plan(), **batch)
    with pytest.raises(RuntimeError, match="no 'shift'"):
        net(X, mask=batch["mask"])


def test_a_number_that_is_traced_as_an_input_may_be_left_at_its_default():
    net = fxlocal.transform(Text(False), Plan(), ids=IDS, scale=3.0)
    assert torch.equal(net(IDS), Text(False)(IDS))
    assert torch.equal(net(IDS, scale=5.0), Text(False)(IDS, scale=5.0))


@pytest.mark.sample(2)
@pytest.mark.parametrize("wrapper", [Wrapper, lambda inner: Wrapper(Wrapper(inner))])
@BOTH_WAYS
def test_args_are_taken_by_position(wrapper, by_shape):
    if by_shape and not EXPORTS_KEYWORDS:
        pytest.skip("torch.export gives **kwargs no dynamic batch")
    model = wrapper(Text(by_shape))
    net = fxlocal.transform(model, PREFIX, IDS, MASK, labels=LABELS)
    assert str(inspect.signature(net.forward)).startswith("(args_0, args_1, labels=")
    laws.assert_equal(
        laws.tensors(net(IDS, MASK, labels=LABELS)),
        laws.tensors(model(IDS, MASK, None, None, LABELS)),
        "output",
    )
    assert torch.equal(net.eval()(IDS, MASK), model(IDS, MASK))
    assert len(fxlocal.analyze(model, IDS).layers) == 3


def test_the_batch_stays_dynamic():
    for case in (case for case in CASES if EXPORTS_KEYWORDS or "wrapped" not in case):
        model, batch = build(case, True)
        net = fxlocal.transform(model, Plan(), **batch)
        fewer = {n: v[:4] if len(v) == 6 else v for n, v in batch.items()}
        laws.assert_equal(laws.tensors(net(**fewer)), laws.tensors(model(**fewer)), "output")


class Unsayable(Net):
    def forward(self, x, how=F.relu, mask=None):
        return self.layers(how(x) if mask is None else how(x) * mask)


@BOTH_WAYS
def test_a_default_that_code_cannot_say_stays_where_it_is(by_shape):
    model = Unsayable(by_shape)
    net = fxlocal.transform(model, Plan(), X, mask=X)
    assert str(inspect.signature(net.forward)) == "(x, mask=None)"
    for _ in range(2):
        assert torch.equal(net(X, mask=X), model(X, mask=X))
        net.eval()
    assert torch.equal(net(X), model(X))


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (
            (),
            {"ids": IDS, "tags": X},
            "got 2 inputs for a forward.*unexpected keyword argument 'tags'",
        ),
        ((IDS,), {"ids": IDS}, "multiple values for argument 'ids'"),
        ((1, 2, 3, 4, 5, 6, 7), {}, "too many positional"),
    ],
)
def test_examples_that_the_model_does_not_take_are_refused(args, kwargs, said):
    for call in (
        fxlocal.analyze,
        fxlocal.capture,
        lambda m, *a, **k: fxlocal.transform(m, Plan(), *a, **k),
    ):
        with pytest.raises(TypeError, match=said):
            call(Text(False), *args, **kwargs)
    with pytest.raises(TypeError, match=r"missing a required .*'shift'"):
        fxlocal.Driver(Image(False), Constant(Plan()), example_inputs=(X,))
