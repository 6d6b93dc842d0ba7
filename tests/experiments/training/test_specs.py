"""Specs become schedules, with the arguments that they were given."""

from dataclasses import replace
from typing import get_args

import pytest
from support.tiny import resnet, run, schedule_of

import fxlocal
from fxlocal import Freeze, Hebbian, Oja, Plan, Random, TopK, Zero
from fxlocal.experiments.training.specs import (
    Part,
    StrategyError,
    describe_strategy,
    is_model,
    parse_spec,
    read_value,
    split_list,
    value_text,
)
from fxlocal.experiments.training.strategies import PREFIXES, STRATEGIES, Table
from fxlocal.schedules import NAMED, Approximation, Constant, Dynamic, Plateau, Static

# What the text says


def test_a_spec_has_parts_with_arguments():
    spec = parse_spec("freeze-eval(start=0.2)+topk(k=2, force=true)")
    assert spec.parts == (
        Part("freeze-eval", {"start": 0.2}),
        Part("topk", {"k": 2, "force": True}),
    )
    assert spec.text == "freeze-eval(start=0.2)+topk(k=2, force=true)"
    assert spec.arguments["freeze-eval"]["start"] == 0.2
    topk = dict(k=2, scale=1.0, force=True, approximate="schedule-1", plateau=None)
    assert spec.arguments["topk"] == topk


def test_more_can_be_told_of_a_spec():
    spec = parse_spec("local-dynamic+backlink").told(alpha=0.75, link=2)
    assert spec.text == "local-dynamic(alpha=0.75)+backlink(alpha=0.75,link=2)"
    assert parse_spec(spec.text) == spec
    with pytest.raises(StrategyError, match=r"local-dynamic.* has no argument 'liink'.*'link'"):
        spec.told(liink=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("1e-4", 1e-4),
        ("none", None),
        ("TRUE", True),
        ("schedule-1", "schedule-1"),
        ("'linear'", "linear"),
        ("(0.5, 10)", (0.5, 10)),
    ],
)
def test_values_are_literals_or_words(text, value):
    assert read_value(text) == value and read_value(value_text(value)) == value


def test_lists_are_split_outside_of_brackets():
    assert split_list("sgd, a(b=(1,2),c='x,y')") == ["sgd", "a(b=(1,2),c='x,y')"]


def test_numbers_of_whole_values_become_those_of_their_type():
    given = parse_spec("local-static(rate_decay=(1,3),largest=1)").parts[0].given
    assert repr(given) == "{'rate_decay': (1.0, 3), 'largest': 1.0}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local", r"unknown strategy 'local'.*'local-static'"),
        ("topk(q=1)", r"topk has no argument 'q'. Nearest: .*; topk\(k=1,scale=1.0"),
        ("freeze(rate=1)", "freeze has no argument 'rate'. Nearest: 'curve'"),
        ("sgd(largest=0.5)", "sgd has no argument 'largest'. Nearest: none; sgd takes none"),
        ("topk(k)", "'k': give ARGUMENT=VALUE"),
        ("topk(k=1,k=2)", "k comes twice"),
        ("topk(k=1", "a bracket or a quote is not closed"),
        ("topk(k=1)2", r"give NAME\(ARGUMENT=VALUE"),
        ("topk(k=$)", "'.' is no value"),
        ("topk(k=x)", "topk: k=x is not a whole number"),
        ("topk(k=true)", "topk: k=true is not a whole number"),
        ("topk(force=1)", "force=1 is not true or false"),
        ("local-dynamic(shift=blocks)", "shift=blocks is not a number or one of block or none"),
        ("freeze(curve=cubic)", "curve=cubic is not one of linear, quadratic, exponential"),
        ("local-static(rate_decay=0.5)", r"is not \(a number, a whole number\) or none"),
        ("zero+topk", "'zero.topk': its parts contradict"),
        ("local-static+freeze", "join one of local-static, .* and one of zero, random, topk"),
        ("zero+zero", "contradict each other or change nothing"),
        ("sgd+zero", "contradict each other or change nothing"),
        ("greedy+dgl", "contradict each other"),
        ("sgd+greedy", "contradict each other"),
        ("checkpoint+freeze", "contradict each other"),
        ("freeze+zero+random", "contradict"),
        ("freeze+zoro(std=1)", "unknown strategy 'zoro' in 'freeze.zoro.*'. Nearest: 'zero'"),
        ("freeze+", "unknown strategy '' in 'freeze.'"),
        ("resnet14", "'resnet14' is a model: fxlocal compare"),
        ("torchvision:resnet18", "is a model"),
    ],
)
def test_what_is_no_spec_is_refused_in_one_line(text, message):
    with pytest.raises(StrategyError, match=message) as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local-static(largest=1.5)", "largest=1.5"),
        ("local-static(start=-1)", "start=-1"),
        ("local-static(rate=1e999)", "rate=inf"),
        ("freeze(c1=1)", "c1=1.0, c2=None: give both"),
        ("zero(plateau=0)", "patience=0"),
        ("backlink(modules=0)", "count=0"),
        ("backlink(alpha=1.5)", "alpha=1.5"),
        ("backlink(link=-1)", "link=-1"),
        ("dgl(replay=0)", "replay=0: give 1 or more"),
        # Idle beside another argument.
        ("freeze(c1=1,c2=0.1,largest=0.5)", "largest=0.5: changes nothing"),
        ("refresh(c1=1,c2=0.1,start=0.5)", "start=0.5: changes nothing"),
        ("backlink(link=0,alpha=0.7)", "alpha=0.7: changes nothing where link=0"),
        ("backlink(link=0,weighting=compound)", "weighting=compound: changes nothing where link=0"),
    ],
)
def test_arguments_out_of_range_or_idle_are_refused(text, message):
    with pytest.raises(StrategyError, match=f"strategy '{text.partition('(')[0]}.*{message}"):
        schedule_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "freeze(refresh_every=4)",
        "freeze-eval(norm=eval)",
        "local-static(rule=oja,start=0)",
        "local-static(c1=1,c2=0.1,largest=0.6)",
        "topk(k=2,scale=0.5,plateau=3)",
        "freeze-eval(largest=0.5)+random(std=0.1,approximate=cnn2)",
        "local-dynamic(average=window,alpha=0.75)",
        "checkpoint(modules=8,balance=time)",
        "dgl(replay=2,head=linear)+freeze",
        "stochastic-depth(rate=0.25,mode=block)",
        "stochastic-depth(curve=uniform)+topk",
    ],
)
def test_arguments_that_do_something_are_not_refused(text):
    schedule_of(text, epochs=12)


def test_models_are_told_from_strategies():
    assert is_model("resnet14") and is_model("own.module:factory")
    assert not any(map(is_model, (*STRATEGIES, "sgd-same-time", "freeze+topk", "resnet15")))


def test_a_strategy_is_described_as_a_spec_that_changes_nothing():
    for name in STRATEGIES:
        text = describe_strategy(name)
        assert repr(schedule_of(text)) == repr(schedule_of(name))


# Prefixes


def test_sgd_never_rewrites():
    assert schedule_of("sgd") == Constant(Plan())


def test_local_and_frozen_prefix_end_at_the_same_layer():
    analysis = fxlocal.analyze(resnet())
    local, frozen = (schedule_of(name, 9) for name in ("local-static", "freeze"))
    for epoch in range(9):
        ours, theirs = (s.plan(analysis, epoch).local for s in (local, frozen))
        assert (ours is None) == (theirs is None)
        if ours and theirs:
            assert ours.until == theirs.until
            assert (ours.rule, theirs.rule) == (Hebbian(1e-4), Freeze())
    assert local.plan(analysis, 8).local is not None


def test_freezing_by_the_dynamic_rule_has_its_boundary_and_moves_nothing():
    analysis = fxlocal.analyze(resnet())
    dynamic = dict(average="window", alpha=0.9, shift=0.1, largest=0.5)
    frozen = parse_spec("freeze-dynamic").told(**dynamic, norm="eval").schedule(9)
    assert frozen == Dynamic(9, **dynamic, rule=Freeze(), weak_supervision=False, norm="eval")
    local = parse_spec("local-dynamic").told(**dynamic).schedule(9)
    for norm in (4.0, 4.0, 4.0, 1.0, 4.0, 0.5):
        frozen.end_epoch(analysis, norm)
        local.end_epoch(analysis, norm)
    assert [frozen.boundary(analysis, e) for e in range(7)] == [
        local.boundary(analysis, e) for e in range(7)
    ]
    assert frozen.plan(analysis, 6).local.rule == Freeze()


def test_boundary_waits_for_the_first_fall_of_the_learning_rate():
    analysis = fxlocal.analyze(resnet())
    schedule = schedule_of("freeze", 12)
    moved = [schedule.plan(analysis, epoch).local is not None for epoch in range(12)]
    assert moved.index(True) >= 4


def test_arguments_reach_the_schedule():
    shared = dict(norm="eval", rate_decay=(0.5, 3), align=False, weak_supervision=False)
    shared |= {"update_every": 2, "refresh_every": 3}
    rule = Oja(0.01, relative=True)
    told = dict(rule="oja", rate=0.01, relative=True, **shared)
    curve = dict(curve="linear", c1=-1.0, c2=2.0)
    static = parse_spec("local-static").told(**told, **curve).schedule(9)
    assert static == Static(9, **curve, rule=rule, **shared)
    dynamic = dict(average="window", alpha=0.9, shift=0.1, largest=0.5)
    made = parse_spec("local-dynamic").told(**told, **dynamic).schedule(9)
    assert made == Dynamic(9, **dynamic, rule=rule, **shared)
    usual = schedule_of("local-dynamic", 9)
    assert usual == Dynamic(9, "exponential", 0.5, 0.12, 0.6)
    window = schedule_of("local-dynamic(average=window)", 9)
    assert window == Dynamic(9, "window", 0.95, "block", 0.75)
    assert schedule_of("local-dynamic(shift=block)", 9) == Dynamic(9, shift="block", largest=0.6)


def test_refresh_is_a_frozen_prefix_with_a_full_step_now_and_then():
    analysis = fxlocal.analyze(resnet())
    schedule = schedule_of("refresh", 9)
    plans = [schedule.plan(analysis, 8, step).local for step in range(4)]
    assert plans[3] is None
    assert plans[0] == plans[1] == plans[2] == replace(plans[0], rule=Freeze(), norm="eval")
    every = schedule_of("refresh(refresh_every=2)", 9)
    assert every.plan(analysis, 8, 1).local is None


def test_every_strategy_makes_a_schedule():
    analysis = fxlocal.analyze(resnet())
    for name in STRATEGIES:
        assert isinstance(schedule_of(name, 9).plan(analysis, 8), Plan)


# Approximations


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("zero(approximate=schedule-2)", Approximation.named("schedule-2", Zero())),
        ("random(std=0.1)", Approximation.named("schedule-1", Random(0.1))),
        ("random", Approximation.named("schedule-1", Random())),
        ("topk", Approximation.named("schedule-1", TopK())),
        (
            "topk(k=3,scale=0.5,force=true,approximate=cnn2)",
            Approximation.named("cnn2", TopK(3, 0.5, force=True)),
        ),
        ("zero(plateau=2)", Plateau(Approximation.named("schedule-1", Zero()), patience=2)),
    ],
)
def test_an_approximation_has_its_method_and_the_schedule_of_that_name(text, schedule):
    assert schedule_of(text) == schedule


def test_every_schedule_of_the_papers_can_be_chosen():
    assert get_args(Table) == NAMED


@pytest.mark.parametrize("name", ["zero", "random", "topk"])
def test_an_approximation_trains(name):
    schedule = schedule_of("topk(force=true)" if name == "topk" else name)
    record, plain = run(resnet(), schedule), run(resnet(), Constant(Plan()))
    assert record.loss[0] != plain.loss[0]
    assert record.boundary == [0] * 4


# Combinations


@pytest.mark.parametrize("name", ["freeze+zero", "topk+local-static", "refresh+random"])
def test_plans_of_a_combination_hold_both_parts(name):
    analysis = fxlocal.analyze(resnet())
    spec = parse_spec(name).told(largest=0.5, approximate="schedule-3")
    both = spec.schedule(9)
    prefix, other = sorted(
        map(str, spec.parts), key=lambda part: part.split("(")[0] not in PREFIXES
    )
    local = schedule_of(prefix, 9).plan(analysis, 8).local
    methods = schedule_of(other, 9).plan(analysis, 8).weight_grads
    plan = both.plan(analysis, 8)
    assert plan.local == local
    later = {layer.path for layer in analysis.layers[analysis.boundary(local.until) :]}
    assert plan.weight_grads == {p: m for p, m in methods.items() if p in later}
    assert plan.weight_grads and len(plan.weight_grads) < len(methods)
    assert both.plan(analysis, 0) == Plan(weight_grads=methods)
    assert both.plan(analysis, 0, step=1) == Plan()


@pytest.mark.parametrize(
    "spec",
    [
        "local-static(start=0.25,largest=0.8)+zero(plateau=2)",
        "freeze-eval(start=0.25,largest=0.8)+topk(force=true)",
        "local-dynamic(largest=0.8,alpha=1,shift=0.3)+random",
        "freeze-dynamic(largest=0.8,alpha=1,shift=0.3)+topk(force=true)",
    ],
)
def test_a_combination_trains(spec):
    record = run(resnet(), schedule_of(spec))
    assert len(record.loss) == 4 and record.boundary[-1] > 0
