"""A network is called as its model is: by keyword, with optional inputs left out, through *args."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import laws
from torch import nn

import fxlocal
from fxlocal import Checkpoint, Freeze, Hebbian, LocalModules, LocalPrefix, Plan, Zero
from fxlocal.runtime.compile import ByModule
from fxlocal.schedules import Constant

X, IDS = torch.randn(6, 4), torch.randint(9, (6, 3))
MASK, LABELS = torch.rand(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
PREFIX = Plan(local=LocalPrefix(until=1, rule=Freeze()))


class Net(nn.Module):
    """Has three layers; ``by_shape`` is what only torch.export can follow."""

    def __init__(self, by_shape):
        super().__init__()
        torch.manual_seed(0)
        self.by_shape = by_shape
        self.embedding = nn.Embedding(9, 4)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def layers(self, x):
        if self.by_shape and x.shape[-1] < 2:
            raise ValueError
        return self.last(self.second(self.first(x).relu()).relu())


class Text(Net):
    """Takes its inputs as a language model does: all of them may be left out."""

    def forward(self, ids=None, mask=None, types=None, embedded=None, labels=None, scale=1.0):
        x = self.embedding(ids) if embedded is None else embedded
        x = x * mask[..., None] if mask is not None else x
        x = x.mean(1) + (0 if types is None else self.embedding(types))
        scores = self.layers(x) * scale
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)


class Image(Net):
    """Takes a mask by keyword only, between what has a default and what has none."""

    def forward(self, x, flip=False, *, shift, mask=None):
        x = -x if flip else x + shift
        return self.layers(x if mask is None else x * mask)


class Wrapper(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "nothing"}
        return self.inner(*args, **kwargs)


class Prefixed(Wrapper):
    def forward(self, gain, *args, nothing=None, **kwargs):
        return self.inner(*args, **kwargs) if nothing is None else gain


CASES = {
    "text": (Text, dict(ids=IDS, mask=MASK, labels=LABELS)),
    "text without labels": (Text, dict(ids=IDS, mask=MASK)),
    "text embedded": (Text, dict(embedded=torch.randn(6, 3, 4))),
    "image": (Image, dict(x=X, shift=torch.ones(6, 1), mask=torch.rand(6, 4))),
    "image without mask": (Image, dict(shift=torch.ones(6, 1), x=X)),
    "wrapped text": (lambda by: Wrapper(Text(by)), dict(ids=IDS, labels=LABELS)),
    "wrapped twice": (lambda by: Prefixed(Wrapper(Text(by))), dict(gain=X, ids=IDS, mask=MASK)),
}
BOTH_WAYS = pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
EACH = pytest.mark.parametrize("case", CASES)


EXPORTS_KEYWORDS = torch.__version__ >= "2.14"  # torch.export of **kwargs with a dynamic batch


def build(case, by_shape):
    if by_shape and case.startswith("wrapped") and not EXPORTS_KEYWORDS:
        pytest.skip("torch.export gives **kwargs no dynamic batch")
    make, batch = CASES[case]
    return make(by_shape), dict(batch)


def test_which_cases_are_exported():
    for case in CASES:
        for by_shape in (False, EXPORTS_KEYWORDS or not case.startswith("wrapped")):
            model, batch = build(case, by_shape)
            captured = fxlocal.capture(model, **batch)
            assert ("captured_with" in captured.meta) == by_shape, case


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


# --- everything that takes a batch ---------------------------------------------------------------


def modules(count=2, **more):
    return Plan(modules=LocalModules(count, num_classes=3, balance=("second",), **more))


class Vision(Net):
    """Has optional inputs where a target would be bound."""

    def forward(self, x, mask=None, causal=False):
        return self.layers(x if mask is None else x * mask)


@BOTH_WAYS
def test_the_target_stands_behind_the_inputs_of_the_example(by_shape):
    net = fxlocal.transform(Vision(by_shape), modules(), X)
    assert str(inspect.signature(net.forward)) == "(x, target=None, mask=None, causal=False)"
    (output, loss), (_, named) = net(X, LABELS), net(X, target=LABELS)
    assert torch.equal(output, Vision(by_shape)(X))
    assert torch.equal(loss, named)
    assert not fxlocal.verify(net, X, LABELS).unmet
    assert set(fxlocal.find_stages(net)[0].inputs) == {"x", "target"}
    for wrong in (lambda: net(X, LABELS, X), lambda: net(X, LABELS, mask=X)):
        with pytest.raises(RuntimeError, match="captured with None"):
            wrong()
    with pytest.raises(ValueError, match=r"no target: .* net\(x, target\)"):
        net(X)
    assert torch.equal(net.eval()(X), Vision(by_shape)(X))
    assert torch.equal(net(X, mask=X), Vision(by_shape)(X, X))


@BOTH_WAYS
def test_the_target_stands_behind_given_optional_inputs(by_shape):
    net = fxlocal.transform(Vision(by_shape), modules(), X, X)
    assert torch.equal(net(X, X, LABELS)[0], Vision(by_shape)(X, X))
    given_none = fxlocal.transform(Vision(by_shape), modules(), X, None)
    assert torch.equal(given_none(X, None, LABELS)[0], Vision(by_shape)(X))
    text = fxlocal.transform(Text(by_shape), modules(), ids=IDS, mask=MASK)
    assert torch.equal(text(IDS, MASK, LABELS)[0], Text(by_shape)(IDS, MASK))
    assert torch.equal(text(mask=MASK, ids=IDS, target=LABELS)[0], Text(by_shape)(IDS, MASK))
    assert not fxlocal.verify(text, target=LABELS, mask=MASK, ids=IDS).unmet


@BOTH_WAYS
def test_modules_that_are_compiled_one_by_one_take_keywords(by_shape):
    net = fxlocal.transform(Text(by_shape), modules(), ids=IDS, mask=MASK)
    compiled = ByModule(net, {"backend": "eager"})
    ours, theirs = compiled(ids=IDS, mask=MASK, target=LABELS), net(IDS, MASK, LABELS)
    laws.assert_equal(ours, theirs, "output and loss")
    with pytest.raises(RuntimeError, match="captured with None"):
        compiled(ids=IDS, mask=MASK, types=IDS, target=LABELS)


@pytest.mark.parametrize(
    "plan",
    [
        PREFIX,
        Plan(local=LocalPrefix(until=1, rule=Hebbian(0.01))),
        Plan(weight_grads={"second": Zero()}),
        Plan(checkpoint=Checkpoint(2)),
    ],
    ids=["freeze", "hebbian", "zero", "checkpoint"],
)
@EACH
def test_every_plan_is_driven_compiled_and_pickled_with_such_a_batch(case, plan):
    model, batch = build(case, False)
    eager = copy.deepcopy(model)
    if plan.weight_grads:
        path = next(name for name, _ in model.named_modules() if name.endswith("second"))
        plan = Plan(weight_grads={path: Zero()})
    driver = fxlocal.Driver(model, Constant(plan), example_inputs=batch)
    driver.start_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of approximations that gain nothing
        net = fxlocal.transform(copy.deepcopy(model), plan, **batch)
    whole = torch.compile(net, backend="eager", fullgraph=True)
    again = pickle.loads(pickle.dumps(fxlocal.transform(copy.deepcopy(model), PREFIX, **batch)))
    for call in (driver.network(), net, whole, again, copy.deepcopy(net)):
        if plan.local is None or not plan.rate:
            laws.assert_equal(laws.tensors(call(**batch)), laws.tensors(eager(**batch)), "output")
        else:
            call(**batch)
    with pytest.raises((RuntimeError, TypeError), match=r"captured with|unexpected keyword"):
        again(**{**batch, **{"image": {"flip": True}}.get(case, {"types": IDS[:, 0]})})


class Caching(Text):
    """Fills a table in its first call."""

    table = None

    def forward(self, ids=None, mask=None, labels=None):
        if self.table is None:
            self.table = torch.arange(ids.shape[1]) / 9
        return super().forward(
            ids, self.table if mask is None else mask * self.table, labels=labels
        )


@BOTH_WAYS
def test_a_cache_that_the_first_call_fills_is_found_with_keywords(by_shape):
    net = fxlocal.transform(Caching(by_shape), Plan(), labels=LABELS, ids=IDS)
    theirs = Caching(by_shape)(labels=LABELS, ids=IDS)
    laws.assert_equal(laws.tensors(net(IDS, labels=LABELS)), laws.tensors(theirs), "output")


def test_hooks_of_the_model_get_what_they_got_before():
    model, seen = Vision(False), []
    net = fxlocal.transform(model, Plan(), X).eval()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args)))
    net(X)
    assert seen == [3]
