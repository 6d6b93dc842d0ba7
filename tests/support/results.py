"""The content of ``results.json`` for runs that nobody made."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any


def make_run(strategy: str, seed: int, error: float | None, epochs: int = 4) -> dict[str, Any]:
    """A run that was never evaluated before its end."""
    return {
        "strategy": strategy,
        "seed": seed,
        "error_percent": error,
        "train_seconds": 10.0 + seed,
        "compile_seconds": 0.5,
        "saved_bytes": [(8 - epoch) * 2**20 for epoch in range(epochs)],
        "boundary": list(range(epochs)),
        "loss": [2.0 / (1 + epoch) for epoch in range(epochs)],
        "errors": [],
        "error_epochs": [],
        "seconds": [],
        "batch_size": [16] * epochs,
        "images": 100 * epochs,
        "reached": True,
    }


def with_errors(run: dict[str, Any], every: int = 2) -> dict[str, Any]:
    """Add what the plots of the error need; evaluated at every second epoch."""
    evaluated = list(range(every, len(run["loss"]) + 1, every))
    seconds = [2.5 * (epoch + 1) for epoch in range(len(run["loss"]))]
    return run | {
        "error_epochs": evaluated,
        "errors": [50.0 / epoch + run["seed"] for epoch in evaluated],
        "seconds": seconds,
    }


def make_results(
    runs: Sequence[dict[str, Any]], device: str = "cpu", compiled: bool = False
) -> dict[str, Any]:
    summary = []
    for name in dict.fromkeys(run["strategy"] for run in runs):
        mine = [r["error_percent"] for r in runs if r["strategy"] == name]
        errors = [e for e in mine if e is not None and e == e]
        summary.append(
            {
                "strategy": name,
                "error_percent_mean": fmean(errors) if errors else None,
                "error_percent_std": stdev(errors) if len(errors) > 1 else None,
                "speedup": 1.37 if errors else None,
                "images_per_second": 99.0 if errors else None,
            }
        )
    return {
        "data": "digits",
        "model": "resnet14",
        "epochs": 4,
        "metric": "error",
        "device": device,
        "compile": compiled,
        "versions": {"torch": "2.15.0", "fxlocal": "0.1.0"},
        "runs": list(runs),
        "summary": summary,
    }


def many_results(epochs: int = 100, seeds: int = 3) -> dict[str, Any]:
    """Twelve strategies: one with a boundary, one with local modules, one that diverged."""
    names = ["sgd", "freeze", "backlink(modules=3)", *(f"topk(k={k})" for k in range(1, 9)), "lost"]
    runs = []
    for i, name in enumerate(names):
        for seed in range(seeds):
            run = with_errors(make_run(name, seed, 5.0 - 0.3 * i + seed, epochs), every=1)
            run["boundary"] = [0] * epochs
            if name == "freeze":
                run["boundary"] = [epoch * 10 // epochs for epoch in range(epochs)]
            run["train_seconds"] = run["seconds"][-1] * (1 - 0.05 * i)
            runs.append(run)
    for run in runs[-seeds:]:
        run |= {"error_percent": None, "loss": [*run["loss"][:-1], None]}
    starts = {"backlink(modules=3)": [0, 3, 6]}
    facts = {"prefixes": {"freeze": "frozen"}, "module_starts": starts, "epochs": epochs}
    made = {"command": "fxlocal compare --strategies 'sgd,...'", "host": "here", "date": "today"}
    return make_results(runs) | facts | made
