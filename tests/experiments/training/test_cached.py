"""Runs with a cache of frozen prefixes: they learn the same, or see a few fixed draws of images."""

from dataclasses import replace

import pytest
import torch
from support.tiny import SETTINGS, experiment, fake_data, resnet, small_comparison, text_of

from fxlocal.experiments.cli.options import keep_prefixes
from fxlocal.experiments.data.images import crop_and_flip
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.recipe.cached import cached_batches
from fxlocal.experiments.training.results import Results, Run, epoch_columns
from fxlocal.experiments.training.settings import Machine, SettingsError
from fxlocal.experiments.training.specs import StrategyError, parse_spec
from fxlocal.runtime.cache.kept import Kept
from fxlocal.schedules import Constant


def shifted(images, generator):
    return crop_and_flip(images, generator, padding=1)


def augmented_data():
    return replace(fake_data(), augment=shifted)


def test_a_run_with_a_cache_learns_the_same(monkeypatch):
    monkeypatch.setattr(Kept, "compute_seconds", 1.0)  # whatever the clock says
    computed = []
    values = Kept.values

    def counting(self, before, ids, given):
        return values(self, lambda *x: computed.append(len(x[0])) or before(*x), ids, given)

    monkeypatch.setattr(Kept, "values", counting)
    specs = ["freeze-eval(curve=step)", "freeze-eval(curve=step,cache=1MiB)"]
    results = small_comparison(specs, settings=replace(SETTINGS, epochs=3), build=resnet)
    plain, cached = results.runs
    assert (plain.loss, plain.errors, plain.boundary) == (
        cached.loss,
        cached.errors,
        cached.boundary,
    )
    moves = len({*filter(None, cached.boundary)})
    assert sum(computed) == 64 * moves < 64 * sum(map(bool, cached.boundary))
    told = text_of(comparison_table(results.to_json(), 10), width=140)
    assert "cold epoch s" in told and "where a cache is filled" in told


def test_epochs_are_cold_where_the_boundary_is_new():
    run = Run("freeze-eval(cache=1MiB)", 0, 1.0, 11.0, boundary=[0, 2, 2, 3], images=4)
    runs = [replace(run, seconds=[1.0, 4.0, 6.0, 11.0], loss=[0.0] * 4)]
    results = Results("fake", "tiny", 4, Machine(), runs=runs).to_json()
    assert epoch_columns(results) == {"freeze-eval(cache=1MiB)": ("4.00", "2.00")}
    assert epoch_columns({**results, "summary": [{"strategy": "sgd"}]}) == {}


def job(data, **options):
    text = ",".join(f"{name}={value}" for name, value in options.items())
    spec = parse_spec(f"freeze-eval({text})")
    return experiment(resnet(), Constant(), SETTINGS, data=data).by(spec)


def test_augmented_images_come_in_so_many_draws():
    told = job(augmented_data(), cache="1MiB", augmentations=2)
    seen = {}
    for epoch in range(6):
        for x, _, ids in cached_batches(told, 16, epoch):
            for image, own in zip(x, ids.tolist(), strict=True):
                assert torch.equal(seen.setdefault(own, image), image)
    assert 64 < len(seen) <= 128
    assert any(not torch.equal(seen[own], seen.get(own ^ 1, seen[own])) for own in seen)


@pytest.mark.parametrize(
    "data, options, message",
    [
        (augmented_data, dict(cache="1MiB"), "fake is augmented by shifted.*--augment none"),
        (fake_data, dict(cache="1MiB", augmentations=2), "augmentations=2: fake is not augmented"),
        (augmented_data, dict(cache="1MiB", augmentations=0), "augmentations=0.*1 or more"),
        (fake_data, dict(augmentations=2), "changes nothing without cache"),
        (fake_data, dict(cache="much"), "bytes='much'"),
    ],
)
def test_what_no_cache_holds_is_refused(data, options, message):
    with pytest.raises((SettingsError, StrategyError), match=message):
        job(data(), **options)


def test_the_option_is_an_argument_of_what_takes_it():
    assert keep_prefixes(["sgd", "freeze-eval", "freeze", "refresh", "vgg13"], "1MiB") == [
        *("sgd", "freeze-eval(cache=1MiB)", "freeze", "refresh", "vgg13")
    ]
    assert keep_prefixes(["sgd"], "") == ["sgd"]
    with pytest.raises(SettingsError, match="none of sgd, local-static has a prefix"):
        keep_prefixes(["sgd", "local-static"], "1MiB")
