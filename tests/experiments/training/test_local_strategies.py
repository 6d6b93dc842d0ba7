"""Local modules in a run: the plans of the strategies, heads that learn and are saved, refusals."""

import dataclasses
import json
import re

import pytest
import torch
from support.shell import TINY, fails, succeeds
from support.tiny import (
    SETTINGS,
    dropout_net,
    interrupted,
    resnet,
    run,
    schedule_of,
    small_comparison,
    text_of,
)

import fxlocal
from fxlocal import CheckpointError, Freeze, Plan, PlanError, TopK
from fxlocal.experiments.data.catalogue import load_data
from fxlocal.experiments.data.task import Goal
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.page import render_page
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.measure import count_saved_bytes
from fxlocal.experiments.training.objective import classification_loss, segmentation_loss
from fxlocal.experiments.training.parts.stepper import Stepper
from fxlocal.experiments.training.settings import Machine, Settings
from fxlocal.experiments.training.specs import StrategyError, parse_spec
from fxlocal.experiments.training.strategies import MODULES
from fxlocal.experiments.training.sweep import build_variants, parse_grid
from fxlocal.plan import ConvHead, InfoProHead, LinearHead, LocalModules
from fxlocal.schedules import Constant

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

GOAL = Goal(10)
SMALL = "modules=2,balance=blocks"


def small(name, more=""):
    """The schedule of two modules, with a head of one layer where there is one to choose."""
    head = "" if name == "infopro" else ",head=linear"
    return schedule_of(f"{name}({SMALL}{head}{more})")


def modules(spec, goal=GOAL):
    schedule = schedule_of(spec, goal=goal)
    assert isinstance(schedule, Constant)
    return schedule.fixed.modules


# Plans


def test_each_strategy_has_its_modules():
    shared = dict(num_classes=7, loss=classification_loss)
    greedy, goal = LocalModules(3, head=ConvHead(), **shared), Goal(7)
    assert modules("greedy(modules=3)", goal) == greedy
    assert modules("dgl(modules=3,replay=5)", goal) == dataclasses.replace(greedy, replay=5)
    infopro = dataclasses.replace(greedy, head=InfoProHead())
    assert modules("infopro(modules=3)", goal) == infopro
    linked = dataclasses.replace(greedy, link=2, alpha=0.25)
    assert modules("backlink(modules=3,link=2,alpha=0.25)", goal) == linked
    chosen = modules("greedy(head=linear,balance=blocks)")
    assert (chosen.head, chosen.balance, chosen.count) == (LinearHead(), "blocks", 4)
    assert modules("greedy", Goal(2, "segmentation")).loss is segmentation_loss


def test_the_schedule_prints_the_same_in_every_process():
    """A checkpoint's fingerprint holds this text."""
    for name in MODULES:
        text = repr(small(name))
        assert "objective.classification_loss" in text and "0x" not in text


@pytest.mark.parametrize(
    "spec",
    [
        f"freeze(largest=0.2,start=0)+backlink({SMALL})",
        f"backlink({SMALL})+topk(force=true)",
        f"topk(force=true)+greedy({SMALL})+freeze-eval(largest=0.2,start=0)",
    ],
)
def test_plans_of_a_combination_hold_all_parts(spec):
    analysis = fxlocal.analyze(resnet(), torch.zeros(2, 3, 8, 8))
    plan = schedule_of(spec).plan(analysis, 3)
    assert plan.modules == modules(f"{'greedy' if 'greedy' in spec else 'backlink'}({SMALL})")
    assert (plan.local is not None) == ("freeze" in spec)
    if "freeze" in spec:
        assert plan.local.rule == Freeze()
    assert (TopK(force=True) in plan.weight_grads.values()) == ("topk" in spec)


def test_links_can_be_swept():
    spec = parse_spec("backlink")
    variants = build_variants(spec, parse_grid(["modules=2,4", "link=1,2"], spec), 4)
    assert list(variants)[1:3] == ["modules=2 link=1", "modules=2 link=2"]
    with pytest.raises(StrategyError, match="backlink has no argument 'num_classes'"):
        parse_grid(["num_classes=2,4"], spec)


# Runs


@pytest.fixture(scope="module")
def learn():
    data = load_data("digits")
    data = dataclasses.replace(data, train=torch.utils.data.Subset(data.train, range(256)))
    settings = Settings(epochs=3, batch_size=32, lr=0.1, lr_schedule="constant", evaluate_every=3)

    def train(schedule):
        model = build_model("resnet8", num_classes=10, in_channels=1, width=8, seed=0)
        return run(model, schedule, settings, data=data)

    plain = train(Constant(Plan()))
    return lambda schedule: (train(schedule), plain)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", MODULES)
def test_each_strategy_learns_with_less_memory(name, learn):
    head = "" if name == "infopro" else ",head=linear"
    record, plain = learn(schedule_of(f"{name}(modules=3,balance=blocks{head})", 3))
    assert record.loss[-1] < 0.5 * record.loss[0]
    assert record.error_percent < 60  # of ten classes
    assert record.loss != plain.loss
    if name != "infopro":  # whose decoder works at the resolution of the image
        assert record.saved_bytes[0] < 0.8 * plain.saved_bytes[0]


def test_one_module_is_plain_training():
    one = schedule_of("greedy(modules=1)")
    ours, theirs = run(dropout_net(), one), run(dropout_net(), Constant(Plan()))
    assert ours.loss == theirs.loss and ours.errors == theirs.errors
    assert ours.saved_bytes == theirs.saved_bytes
    assert ours.predicted_bytes == theirs.predicted_bytes


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["backlink", "dgl"])
def test_resume_is_exact_and_takes_the_heads_up(name, tmp_path):
    schedule = small(name)
    straight, broken = tmp_path / "straight.pt", tmp_path / "broken.pt"

    whole = run(dropout_net(), schedule, checkpoint=straight)
    interrupted(broken, 2, dropout_net(), schedule)
    resumed = run(dropout_net(1), schedule, checkpoint=broken, resume=True)
    assert (resumed.loss, resumed.errors) == (whole.loss, whole.errors)
    ours, theirs = (torch.load(p)["state"]["driver"] for p in (straight, broken))
    assert ours["heads"].keys() == theirs["heads"].keys() != set()
    for part in ("model", "heads"):
        for key, value in ours[part].items():
            assert torch.equal(value, theirs[part][key]), key
    held = sum(len(group["params"]) for group in ours["optimizer"]["param_groups"])
    assert held == len(list(dropout_net().parameters())) + len(ours["heads"])
    with pytest.raises(CheckpointError, match="schedule is"):
        run(resnet(), Constant(Plan()), checkpoint=broken, resume=True)


def test_pixels_are_learned_by_the_modules_too():
    data = load_data("membranes", num_train=16, num_test=8, size=16)
    schedule = schedule_of("backlink(modules=3,balance=blocks,head=linear)", 2, data.goal)
    model = build_model("unet", num_classes=2, in_channels=1, width=4, seed=0)
    record = run(model, schedule, Settings(epochs=2, batch_size=8), data=data)
    assert record.loss[1] < record.loss[0] < 1  # a Dice loss


def test_a_network_that_scores_pixels_learns_labels_of_images():
    schedule = small("greedy")
    model = build_model("unet", num_classes=10, in_channels=3, width=2, seed=0)
    data = load_data("fake", num_train=16, num_test=8, size=16)
    record = run(model, schedule, Settings(epochs=1, batch_size=8), data=data)
    assert 0 < record.loss[0] < 10


def test_autocast_trains():
    schedule = small("backlink")
    settings = dataclasses.replace(SETTINGS, epochs=2)
    record = run(resnet(), schedule, settings, Machine(amp=True))
    assert all(0 < loss < 10 for loss in record.loss)


# What is counted


def test_what_an_immediate_backward_frees_counts_no_longer():
    model = torch.nn.Linear(4, 5)
    x = torch.ones(3, 4)
    with count_saved_bytes(model, x) as saved_bytes:
        for _ in range(3):
            model(x).sigmoid().sum().backward()
        assert saved_bytes() == 3 * 5 * 4
        kept = model(x).sigmoid()
        twice = model(x).sigmoid().square()
    assert saved_bytes() == 2 * 3 * 5 * 4  # two sigmoids; a square keeps its input, which is one
    del kept, twice


def test_heads_weights_do_not_count():
    driver = fxlocal.Driver(resnet(), small("greedy"), example_inputs=(torch.ones(16, 3, 8, 8),))
    driver.start_epoch()
    stepper, (x, y) = Stepper(driver, Machine()), (torch.ones(16, 3, 8, 8), torch.arange(16) % 10)
    _, kept = stepper.measure(x, y)
    with count_saved_bytes(driver.model, x) as with_weights:
        stepper.take(x, y)
    (weight, _) = driver.heads.parameters()
    assert with_weights() == kept + weight.nbytes


def test_what_a_link_repeats_is_predicted():
    greedy, linked = (run(resnet(), small(name)) for name in ("greedy", "backlink"))
    assert greedy.predicted_bytes[0] < greedy.saved_bytes[0] < linked.predicted_bytes[0]
    assert linked.saved_bytes[0] == pytest.approx(linked.predicted_bytes[0], rel=0.02)
    assert greedy.predicted_bytes[1:] == greedy.saved_bytes[1:]


# The commands


def test_splits_are_checked_before_anything_is_trained():
    with pytest.raises(PlanError, match="link=9"):
        small_comparison(
            ("sgd", f"backlink({SMALL},link=9)"), on_run=lambda *_: pytest.fail("trained")
        )


def test_a_comparison_has_them_beside_sgd():
    names = ("sgd", f"checkpoint({SMALL})", f"backlink({SMALL},head=linear)+zero")
    once = dataclasses.replace(SETTINGS, epochs=1)
    results = small_comparison(names, settings=once).to_json()
    assert results["modules"] == {
        names[1]: "2 stages, balance blocks",
        names[2]: "2 modules, balance blocks, link 1, linear heads",
    }
    table, page = text_of(comparison_table(results, 10), 160), render_page(results)
    for name, text in results["modules"].items():
        assert f"{name}: {text}" in table and f"{name}: {text}" in page
    assert re.search(r"^sgd .* 0 of 10$", table, re.MULTILINE) and "fake, 1 epoch " in table
    assert re.search(r"^backlink.* -$", table, re.MULTILINE)
    assert "The loss of local modules is that of the\nlast one" in page
    plain, checkpointed, linked = results["runs"]
    assert plain["loss"] == checkpointed["loss"] != linked["loss"]
    assert plain["saved_bytes"][0] > checkpointed["saved_bytes"][0]


def test_training_by_one_goes_on_after_a_break(tmp_path):
    job = ("train", *TINY, "--strategy", "backlink(modules=2)", "--out", "o")
    assert "boundary at layer 0" in succeeds(*job)
    assert "boundary at layer 0" in succeeds(*job, "--resume")


@pytest.mark.slow
def test_a_process_per_module_learns_the_same(tmp_path):
    succeeds("train", *TINY, "--strategy", "backlink", "--nproc", "2", "--out", "two")
    succeeds("train", *TINY, "--strategy", "backlink(modules=2)", "--out", "one")
    two, one = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("two", "one"))
    assert two["runs"][0]["loss"] == pytest.approx(one["runs"][0]["loss"], rel=1e-6)
    assert two["runs"][0]["errors"] == one["runs"][0]["errors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--strategy", "dgl(replay=0)"), "'dgl(replay=0)': replay=0: give 1 or more"),
        (("compare", "--strategies", "sgd,backlink(link=9)"), "link=9"),
        (("train", "--strategy", "greedy(modules=3)", "--nproc", "2"), "nproc=2: 3 local"),
        (("train", "--strategy", "greedy(modules=9)"), "count=9"),
        (("train", "--strategy", "backlink(modules=2,link=4)"), "link=4"),
        (("compare", "--strategies", "sgd,greedy(link=2)"), "greedy has no argument 'link'"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_clear_line_and_makes_no_folder(arguments, message, tmp_path):
    assert message in fails(arguments[0], *TINY, *arguments[1:])
    assert not list(tmp_path.iterdir())
