"""Augmentation, smoothing, clipping, averages, accumulation, freezing, by their equations."""

import dataclasses

import pytest
import torch
from support.tiny import LOCAL, SETTINGS, dropout_net, experiment, resnet, run, schedule_of
from torch import nn
from torch.nn import functional as F

from fxlocal.experiments.data.catalogue import Data
from fxlocal.experiments.data.images import InMemory, crop_and_flip
from fxlocal.experiments.data.task import Goal
from fxlocal.experiments.training.checkpoint import build_fingerprint
from fxlocal.experiments.training.objective import find_loss
from fxlocal.experiments.training.recipe.augment import training_batches
from fxlocal.experiments.training.recipe.tuning import Tuning, freeze, group_parameters
from fxlocal.experiments.training.settings import SettingsError
from fxlocal.plan import Plan
from fxlocal.schedules import Constant

PLAIN = Constant(Plan())
SHORT = dataclasses.replace(SETTINGS, epochs=2, lr=0.1)


def colours(num: int = 32, classes: int = 4) -> Data:
    """Images of one colour each, k/8 of white, so that what is mixed can be told."""
    labels = torch.arange(num) % classes
    images = (labels / 8).float()[:, None, None, None].expand(num, 3, 8, 8).clone()
    half = ((0.5,) * 3, (0.25,) * 3)
    part = InMemory((images - 0.5) / 0.25, labels)
    return Data("colours", part, part, classes, (3, 8, 8), None, statistics=half)


def drawn(augment: str, data: Data, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = dataclasses.replace(SHORT, batch_size=8, augment=augment)
    job = experiment(resnet(), PLAIN, settings, data=data)
    return list(training_batches(job, 8, epoch))


def test_mixed_images_have_mixed_targets_in_the_same_shares():
    for x, y in drawn("mixup(alpha=1)", colours()):
        assert y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8))
        pixels = x * 0.25 + 0.5
        mean = (y @ torch.arange(4.0)) / 8
        torch.testing.assert_close(pixels, mean[:, None, None, None].expand(8, 3, 8, 8))
    for x, y in drawn("cutmix(alpha=1)", colours()):
        shares = ((x * 0.25 + 0.5) * 8).round()[:, 0].flatten(1)
        counted = torch.stack([(shares == label).float().mean(1) for label in range(4)], 1)
        torch.testing.assert_close(counted, y)


def test_randaugment_works_on_each_image_by_itself_and_knows_its_scale():
    labels = torch.zeros(16, dtype=torch.int64)
    noise = torch.rand(1, 3, 8, 8).mul(255).round().div(255).expand(16, 3, 8, 8)
    part = InMemory((noise - 0.5) / 0.25, labels)
    data = dataclasses.replace(colours(), train=part)
    x = torch.cat([x for x, _ in drawn("randaugment(magnitude=20)", data)])
    pixels = x * 0.25 + 0.5
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    assert len({image.numpy().tobytes() for image in pixels}) > 8
    levels = pixels * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("augment", ["none", "standard", "mixup", "standard+randaugment+cutmix"])
def test_an_epochs_draws_depend_on_seed_and_epoch_alone(augment):
    padded = dataclasses.replace(
        colours(), augment=lambda x, generator: crop_and_flip(x, generator, padding=1)
    )
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(augment, padded)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = drawn(augment, padded), drawn(augment, padded, epoch=1)
    assert all(
        torch.equal(a, b)
        for one, two in zip(first, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert not all(torch.equal(one[0], two[0]) for one, two in zip(first, other, strict=True))
    plain = torch.cat([x for x, _ in drawn("none", colours())])
    assert torch.equal(torch.cat([x for x, _ in first]), plain) == (augment == "none")


def test_smoothing_is_cross_entropys_and_equal_goals_have_equal_losses():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = find_loss(Goal(4, label_smoothing=0.2))
    log_p = logits.log_softmax(1)
    by_hand = -(0.8 * log_p[torch.arange(6), target] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(loss(logits, target), by_hand)
    assert loss == find_loss(Goal(4, label_smoothing=0.2)) != find_loss(Goal(4))
    named = find_loss(Goal(4, output="scores"))
    torch.testing.assert_close(
        named({"scores": logits, "logits": -logits}, target), F.cross_entropy(logits, target)
    )
    pixels = logits[:, :, None, None].expand(6, 4, 2, 3)
    soft = F.one_hot(target, 4).float()
    torch.testing.assert_close(find_loss(Goal(4))(pixels, soft), F.cross_entropy(logits, target))


@pytest.mark.parametrize("strategy", ["sgd", "greedy(modules=2)"])
def test_smoothing_reaches_local_heads_too(strategy):
    jobs = [
        experiment(resnet(), schedule_of(strategy, goal=Goal(10, label_smoothing=share)))
        for share in (0.0, 0.1)
    ]
    plans = [job.schedule.plan(None, 0) for job in jobs]
    assert (plans[0] == plans[1]) == (strategy == "sgd")


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(model: nn.Module, settings, ema: float | None = None) -> torch.Tensor:
    """Train as the settings say, in a loop of its own; return the weights, or their average."""
    job = experiment(model, PLAIN, settings)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
    )
    average = None
    for epoch in range(settings.epochs):
        model.train()
        for x, y in training_batches(job, settings.batch_size, epoch):
            F.cross_entropy(model(x), y).backward()
            if settings.clip:
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                for p in model.parameters():
                    p.grad *= min(1.0, settings.clip / (float(norm) + 1e-6))
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                now = weights(model)
                average = now if average is None else ema * average + (1 - ema) * now
    return weights(model) if average is None else average


class Plain(nn.Sequential):
    """No norm and no dropout, so that parts of a batch add up to it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
        )


CONSTANT = dataclasses.replace(SHORT, lr_schedule="constant")


def test_clipping_is_by_the_norm_of_all_gradients():
    settings = dataclasses.replace(CONSTANT, clip=0.05)
    model, other = Plain(), Plain()
    run(model, PLAIN, settings)
    torch.testing.assert_close(weights(model), by_hand(other, settings))
    loose = Plain()
    run(loose, PLAIN, CONSTANT)
    assert not torch.allclose(weights(loose), weights(model), atol=1e-3)


def test_the_average_is_judged_and_kept(tmp_path):
    settings = dataclasses.replace(CONSTANT, ema=0.75, keep_best=True)
    model = Plain()
    run(model, PLAIN, settings, checkpoint=tmp_path / "checkpoint.pt")
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    kept = torch.cat([best[name].flatten() for name, _ in model.named_parameters()])
    epochs = [by_hand(Plain(), dataclasses.replace(settings, epochs=n), 0.75) for n in (1, 2)]
    assert any(torch.allclose(kept, one, rtol=1e-4, atol=1e-6) for one in epochs)
    torch.testing.assert_close(weights(model), by_hand(Plain(), settings))


@pytest.mark.parametrize("schedule", [PLAIN, LOCAL, schedule_of("freeze(start=0,largest=0.9)")])
def test_parts_of_a_batch_add_up_to_its_step(schedule):
    found = []
    for parts in (1, 4):
        model = Plain()
        settings = dataclasses.replace(CONSTANT, epochs=3, accumulate=parts)
        record = run(model, schedule, settings)
        found.append((weights(model), record))
    (whole, one), (summed, other) = found
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.saved_bytes[0] < one.saved_bytes[0] / 3
    assert other.predicted_bytes[0] == pytest.approx(other.saved_bytes[0], rel=0.2)


def test_a_run_ends_when_nothing_gets_better():
    settings = dataclasses.replace(SHORT, epochs=8, lr=0.0, patience=2)
    record = run(Plain(), PLAIN, settings)
    assert len(record.loss) == len(record.errors) == 3
    every = dataclasses.replace(settings, evaluate_every=2)
    assert run(Plain(), PLAIN, every).error_epochs == [2, 4, 6]


def test_paths_are_frozen_and_have_rates_of_their_own():
    model = freeze(dropout_net(), Tuning(freeze="conv1, norm"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "conv1.bias", "norm.weight", "norm.bias"}
    rates = Tuning(lr_of="fc=0.5,conv2=0.25,conv2.bias=0")
    extra = nn.Parameter(torch.zeros(1))  # of a head
    groups = group_parameters(model, [*model.parameters(), extra], rates)
    names = {p: name for name, p in model.named_parameters()} | {extra: "head"}
    found = {names[p]: group.get("lr") for group in groups for p in group["params"]}
    assert found["fc.weight"] == 0.5 and found["conv2.weight"] == 0.25 and found["conv2.bias"] == 0
    assert found["conv1.weight"] is found["head"] is None and len(found) == 11


def test_frozen_weights_stay_and_others_move_at_their_rates():
    settings = dataclasses.replace(
        CONSTANT, epochs=1, batch_size=64, momentum=0.0, weight_decay=0.0, lr_of="fc=0.2"
    )
    model, start = freeze(dropout_net(), Tuning(freeze="conv1")), dropout_net().state_dict()
    slow = freeze(dropout_net(), Tuning(freeze="conv1"))
    run(model, PLAIN, settings)
    run(slow, PLAIN, dataclasses.replace(settings, lr_of=""))
    moved, base = (
        {name: p.detach() - start[name] for name, p in one.named_parameters()}
        for one in (model, slow)
    )
    assert not moved["conv1.weight"].any() and moved["conv2.weight"].any()
    torch.testing.assert_close(moved["fc.weight"], 2 * base["fc.weight"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved["conv2.weight"], base["conv2.weight"])


def test_all_of_it_together_resumes_exactly_and_is_part_of_what_a_run_is(tmp_path):
    class Break(Exception):
        pass

    def stop(record):
        if len(record.loss) == 2:
            raise Break

    told = {"augment": "standard+mixup", "label_smoothing": 0.1, "clip": 1.0, "accumulate": 2}
    told |= {"ema": 0.9, "lr_of": "fc=0.02", "patience": 3}
    settings = dataclasses.replace(SHORT, epochs=3, **told)
    path = tmp_path / "checkpoint.pt"
    whole = run(dropout_net(), LOCAL, settings)
    with pytest.raises(Break):
        run(dropout_net(), LOCAL, settings, checkpoint=path, on_epoch=stop)
    again = run(dropout_net(1), LOCAL, settings, checkpoint=path, resume=True)
    assert (again.loss, again.errors) == (whole.loss, whole.errors)
    for name in told:
        usual = dataclasses.replace(settings, **{name: getattr(SETTINGS, name)})
        fingerprints = [
            build_fingerprint(experiment(dropout_net(), LOCAL, one)) for one in (settings, usual)
        ]
        assert [one[name] for one in fingerprints] == [told[name], getattr(SETTINGS, name)]


REFUSED = {
    "augment=noise": "unknown augmentation 'noise'. Nearest: 'none'",
    "augment=": "unknown augmentation ''",
    "augment=none+mixup": "give each once, and none alone",
    "augment=mixup+mixup": "give each once",
    "augment=mixup+cutmix": "give one of mixup and cutmix",
    "augment=mixup+standard": "standard comes first",
    "augment=mixup(alpha=0)": "alpha=0.0: give a number finite, from 0.001",
    "augment=randaugment(magnitude=31)": "magnitude=31: give a number from 0 to 30",
    "augment=randaugment(m=1)": "randaugment has no argument 'm'",
    "augment=mixup(": "a bracket or a quote is not closed",
    "label_smoothing=1.0": "label_smoothing=1.0: give 0, or less than 1",
    "label_smoothing=nan": "label_smoothing=nan",
    "clip=0.0": "clip=0.0: must be finite, above 0",
    "clip=inf": "clip=inf",
    "accumulate=0": "accumulate=0: must be at least 1",
    "accumulate=3": "accumulate=3: a batch of 16 images has no so many equal parts",
    "ema=1.0": "ema=1.0: give a decay between 0 and 1",
    "patience=0": "patience=0: must be at least 1",
    "freeze=a,,b": "--freeze 'a,,b': give paths separated by commas",
    "freeze=a,a": "none twice",
    "lr_of=fc": "--lr-of 'fc': give PATH=RATE",
    "lr_of=fc=-1": "--lr-of 'fc=-1'",
    "lr_of=fc=1,fc=2": "each path once",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_out_of_range_is_refused_in_one_line(text):
    name, _, value = text.partition("=")
    numbers = {"label_smoothing": float, "clip": float, "ema": float}
    kind = numbers.get(name, int if name in ("accumulate", "patience") else str)
    with pytest.raises(SettingsError) as caught:
        dataclasses.replace(SETTINGS, **{name: kind(value)})
    assert REFUSED[text] in str(caught.value) and "\n" not in str(caught.value)


UNFIT = {
    "accumulate=2": (["greedy(modules=2)"], "local modules learn inside the forward"),
    "accumulate=4": (["prune-train"], "pruning adds its penalty"),
    "ema=0.5": (["prune-train"], "no average of weights that are cut"),
    "augment=randaugment": (["sgd"], "nothing says which values of fake are black and white"),
}


@pytest.mark.parametrize("text", UNFIT)
def test_what_does_not_fit_beside_it_is_refused(text):
    (strategy,), message = UNFIT[text]
    name, _, value = text.partition("=")
    told = {name: float(value) if name == "ema" else int(value) if value.isdigit() else value}
    with pytest.raises(SettingsError, match=message):
        experiment(resnet(), schedule_of(strategy), dataclasses.replace(SETTINGS, **told))
