"""One seed, one thread, deterministic algorithms.

This folder is on the path while the tests run: ``from support.nets import NETS``.
"""

import gc
import os
import warnings
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import oracle
from support.nets import NETS

if not torch.cuda.is_available():  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fxlocal
from fxlocal import LocalPrefix, Plan

pytest.register_assert_rewrite("support.laws")

settings.register_profile(
    "fxlocal",
    deadline=None,  # the machine may be busy
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fxlocal")


def values_of(case):
    return {(name, repr(value)) for name, value in case.callspec.params.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked ``sample(n)`` leave n cases unmarked, which share as little as possible."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        (number,) = cases[0].get_closest_marker("sample").args
        met = Counter()  # how often each value
        for _ in range(min(number, len(cases))):
            chosen = min(cases, key=lambda case: sum(met[value] for value in values_of(case)))
            met.update(values_of(chosen))
            cases.remove(chosen)
        for case in cases:
            case.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Leave modules and tests out of garbage collections, which else take a fifth of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(3000)  # instead of 700: collections took a 15th of the time


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process a stretch of the tests, which share modules, fixtures and caches."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def same_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FXLOCAL_DEBUG", "FXLOCAL_DUMP", "FXLOCAL_SKIP"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def unrendered(monkeypatch):
    """Write plots as empty files, pages without charts, and compare cold: all take their time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("fxlocal.experiments.report.page.draw_charts", lambda results: [])
    monkeypatch.setattr("fxlocal.experiments.training.compare._warm_up", lambda *given: None)

    save = Figure.savefig

    def write(self, path, **options):
        return path.write_bytes(b"") if isinstance(path, Path) else save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", write)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch):
    """Compile by AOTAutograd alone, for what is not about the code: C++ takes ten times as long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def trained_twice():
    """Train a net by the library and by the oracle: (model, trace) of each, in float64.

    One plain step first, so that the momentum is not zero when the prefix turns local; then two
    with the boundary at ``until``.
    """

    def train_both(name, until, rule, norm="train"):
        net = NETS[name]
        ours, theirs = net.build().double(), net.build().double()
        (x,) = (value.double() for value in net.inputs())
        prefix = oracle.Prefix(until, getattr(rule, "rate", 0.0), norm)
        by_hand = partial(oracle.ORACLES[name], theirs)
        forwards = [partial(by_hand, prefix=p) for p in (oracle.Prefix(0), prefix, prefix)]
        sgd = oracle.MomentumSgd(theirs, **oracle.SETTINGS)
        expected = oracle.train(theirs, sgd, forwards, x)

        optimizer = torch.optim.SGD(ours.parameters(), **oracle.SETTINGS)
        trace = oracle.train(ours, optimizer, [ours], x)
        local = Plan(local=LocalPrefix(until=until, rule=rule, norm=norm))
        trace += oracle.train(ours, optimizer, [fxlocal.transform(ours, local)] * 2, x)
        return (ours, trace), (theirs, expected)

    return train_both
