"""Train the same model with several strategies from the same seeds, and say what each bought."""

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

from ...compiler.analysis import Analysis
from ...compiler.resolve import resolve
from ...compiler.split import find_split
from ...errors import nearest
from ...ir.random_state import random_state, restore_random_state
from ...plan import Checkpoint, LocalModules, StochasticDepth
from ..data.images import batches, choose
from ..data.task import METRICS
from ..models.catalogue import MODELS
from ..stopping import StoppedError
from ..tracking import Reading, Tracker
from .baselines import BASELINES, Baseline, find_reference
from .checkpoint import build_fingerprint, holds
from .measure import analyze_on
from .results import Results, Run
from .settings import Experiment, Settings
from .specs import Spec, StrategyError, parse_spec
from .strategies import STRATEGIES
from .trainer import DivergedError, train_run

__all__ = ["Contestants", "Events", "compare", "read_contestants"]

# By the name that its runs are recorded under, a spec or one of `BASELINES`.
Contestants: TypeAlias = Mapping[str, Spec | str]
Build: TypeAlias = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Events:
    """What to call as a comparison goes on.

    Attributes:
        on_run: with strategy and seed, when a run begins.
        on_step: after each step, with how far the run is.
        on_epoch: after each epoch, with the run so far.
        on_model: after each run, with the trained model.
        on_seed: with the results so far, when all runs of a seed are over.
        tracker: told of each step and epoch.
        train: does so, as `train_run` or on several processes, which are not warmed up here.
        find: returns the run of an experiment if it is not to be made again.
        on_end: with each experiment and its run, when that has ended.
        checkpoint: file to write, of the run that goes on.
        resume: go on from it, if that is the run's.
    """

    on_run: Callable[[str, int], object] = lambda name, seed: None
    on_step: Callable[[Reading], object] = lambda reading: None
    on_epoch: Callable[[Run], None] = lambda run: None
    on_model: Callable[[Run, nn.Module], object] = lambda run, model: None
    on_seed: Callable[[Results], object] = lambda results: None
    tracker: Tracker | None = None
    train: Callable[..., Run] = train_run
    find: Callable[[Experiment], Run | None] = lambda experiment: None
    on_end: Callable[[Experiment, Run], object] = lambda experiment, run: None
    checkpoint: Path | None = None
    resume: bool = False


def read_contestants(names: Sequence[str]) -> dict[str, Spec | str]:
    """Read specs and names of `BASELINES`; a StrategyError if one is neither, or comes twice."""
    for name in names:
        if names.count(name) > 1:
            raise StrategyError(f"{','.join(names)}: {name} comes twice; give none twice")
        known = [*STRATEGIES, *BASELINES, *MODELS]
        if re.fullmatch(r"[\w-]*", name) and name not in known:
            raise StrategyError(f"unknown strategy {name!r}. Nearest: {nearest(name, known)}")
    return {name: name if name in BASELINES else parse_spec(name) for name in names}


def compare(
    experiment: Experiment,
    strategies: Contestants,
    seeds: Sequence[int],
    *,
    others: Mapping[str, Build] = MappingProxyType({}),
    settings: Mapping[str, Settings] = MappingProxyType({}),
    done: Mapping[tuple[str, int], Run] = MappingProxyType({}),
    events: Events = Events(),
) -> Results:
    """Run every strategy from every seed.

    Equal seeds mean equal first weights and equal batches. Strategies take turns within a seed, so
    that a machine that grows slower slows them all. A run whose loss stops being a number ends
    there, with an error of None; the others go on, but for the `BASELINES` that it is the reference
    of. These come last within a seed. What a process pays but once is paid before the first run.

    Args:
        experiment: what all runs share, but for schedule, strategy and seed.
        strategies: as `read_contestants` returns them, or by names of your own.
        seeds: one run of each strategy for each.
        others: other models, by name, each made as the experiment makes its own: sgd trains them
            too, as what a strategy has to beat.
        settings: of equal length, in place of the experiment's, by the name of a strategy.
        done: runs that are not to be made again, by strategy and seed; no baseline's.
        events: what to call meanwhile.

    Raises:
        StrategyError: if a name comes twice, or a baseline has nothing to match; before anything is
            trained.
        DataError: if a batch of one needs more images than there are;
        PlanError: if the model has not the blocks for one's local modules;
        SettingsError: if one cannot be compiled as the machine asks; all like this.
    """
    for what, values in (("strategy", [*strategies, *others]), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise StrategyError(f"give at least one {what}, and none twice: {list(values)}")
    specs = {name: spec for name, spec in strategies.items() if isinstance(spec, Spec)}
    entries = {name: replace(experiment.by(spec), strategy=name) for name, spec in specs.items()}
    for name, own in settings.items():
        entries[name] = replace(replace(experiment, settings=own).by(specs[name]), strategy=name)
    for size in (entry.settings.batch_size for entry in entries.values()):
        batches(experiment.data.train, size, drop_last=True)  # refused if there are too few images
    first = experiment.build(seeds[0])
    example = torch.zeros(experiment.settings.batch_size, *experiment.data.shape)
    modules = _find_modules(entries, analyze_on(first, example))
    for name, build in others.items():
        entries[name] = replace(experiment, build=build, strategy=name)
    baselines = {n: BASELINES[s] for n, s in strategies.items() if isinstance(s, str)}
    if baselines:
        texts = {n: s.text if isinstance(s, Spec) else s for n, s in strategies.items()}
        plain, reference = find_reference(texts)
    # Compiling is counted apart, and would be paid again.
    if events.train is train_run and not experiment.machine.compile:
        _warm_up(replace(experiment, seed=seeds[0]), specs.values())
        for build in others.values():
            _warm_up(replace(experiment, build=build, seed=seeds[0]), [parse_spec("sgd")])
    metric = METRICS[experiment.data.task]
    results = Results(
        *(experiment.data.name, experiment.model, experiment.settings.epochs, experiment.machine),
        *(metric, [], modules, list(others)),
    )
    for seed in seeds:
        entries = {name: replace(entry, seed=seed) for name, entry in entries.items()}
        mine = {n: done.get((n, seed)) or _train(entry, events) for n, entry in entries.items()}
        runs = list(mine.values())
        for name, baseline in baselines.items():
            if mine[reference].error_percent is not None:
                entry = replace(entries[plain], strategy=name)
                runs.append(_match(entry, baseline, mine[plain], mine[reference], events))
        results = replace(results, runs=[*results.runs, *runs])
        events.on_seed(results)
    return results


def _match(
    experiment: Experiment, baseline: Baseline, sgd: Run, reference: Run, events: Events
) -> Run:
    """Return the run of a baseline; ``experiment`` is plain SGD's, under the baseline's name."""

    def train(epochs: int) -> Run:
        settings = replace(experiment.settings, epochs=epochs)
        return _train(replace(experiment, settings=settings), events)

    return replace(baseline(sgd, reference, train), strategy=experiment.strategy)


def _train(experiment: Experiment, events: Events) -> Run:
    gc.collect()  # the last run's network may wait in a cycle, and its memory be counted here
    events.on_run(experiment.strategy, experiment.seed)
    if (kept := events.find(experiment)) is not None:
        for _ in kept.loss:
            events.on_epoch(kept)
        return kept
    model = experiment.build(experiment.seed)
    given = replace(experiment, build=lambda seed: model)
    how: dict[str, Any] = {"on_step": events.on_step, "on_epoch": events.on_epoch}
    if path := events.checkpoint:
        goes_on = events.resume and holds(path, build_fingerprint(experiment))
        how |= {"checkpoint": path, "resume": goes_on}
    try:
        run = events.train(given, tracker=events.tracker, **how)
    except DivergedError as error:
        run = replace(error.run, error_percent=None)
    except StoppedError as stop:
        whose = f"in {experiment.strategy}, seed {experiment.seed}, {stop.where}"
        raise StoppedError(stop.number, whose) from None
    events.on_model(run, model)
    events.on_end(experiment, run)
    return run


def _find_modules(entries: Mapping[str, Experiment], analysis: Analysis) -> dict[str, str]:
    """Say what modules or stages each strategy has, or what it drops, of those that do."""
    texts = {}
    for name, entry in entries.items():
        plan = entry.schedule.plan(analysis, 0)
        if stages := plan.modules or plan.checkpoint:
            find_split(analysis, stages)
            texts[name] = _describe_stages(stages)
        if plan.drop:
            resolve(plan, analysis)
            texts[name] = _describe_drop(plan.drop, analysis)
    return texts


def _describe_stages(stages: LocalModules | Checkpoint) -> str:
    if isinstance(stages, Checkpoint):
        return f"{stages.count} stages, balance {stages.balance}"
    head = type(stages.head).__name__.removesuffix("Head").lower()
    kept = f", replay {stages.replay}" if stages.replay else ""
    link = f"link {stages.link}{kept}"
    return f"{stages.count} modules, balance {stages.balance}, {link}, {head} heads"


def _describe_drop(drop: StochasticDepth, analysis: Analysis) -> str:
    survivals = drop.survivals(len(analysis.branches))
    if drop.replace:
        own = (one.drop_path.survival for one in analysis.branches if one.drop_path)
        survivals = tuple(own)
    of = "steps" if drop.mode == "block" else "rows"
    spread = f"{max(survivals, default=1):.0%} to {min(survivals, default=1):.0%}"
    return f"{len(survivals)} residual blocks, computed for {spread} of the {of}"


def _warm_up(experiment: Experiment, specs: Iterable[Spec]) -> None:
    """Take two steps by each strategy and forget them, so that no run pays for being first."""
    data, settings = experiment.data, experiment.settings
    images = torch.arange(min(2 * settings.batch_size, len(data.train)))  # type: ignore[arg-type]
    few = replace(
        experiment,
        data=replace(data, train=choose(data.train, images), test=choose(data.test, images[:1])),
        settings=replace(
            settings, epochs=1, grow_batch=False, memory_budget=None, grow_lr="linear"
        ),
    )
    state = random_state()
    entries = [few.by(spec) for spec in specs]
    for entry in {repr(entry.schedule): entry for entry in entries}.values():
        with contextlib.suppress(DivergedError):
            train_run(entry)
    restore_random_state(state)
