"""Tables of the papers with made-up runs."""

from statistics import fmean, stdev

from fxlocal.experiments.papers.runner import choose_cells, reproduce, settings_of
from fxlocal.experiments.papers.tables import find_table
from fxlocal.experiments.report.paper_tables import publish_table

from .tiny import fake_data


def make_results(runs):
    """The content of results.json for names, seeds, errors and seconds."""
    keys = ("strategy", "seed", "error_percent", "train_seconds")
    shared = {"saved_bytes": [9], "loss": [0.1], "images": 100}
    rows = [dict(zip(keys, run, strict=True)) | shared for run in runs]
    for row in rows:  # as after one epoch
        own = {"errors": [row["error_percent"]], "seconds": [row["train_seconds"]]}
        row |= own | {"error_epochs": [1]}
    summary = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = [r for r in rows if r["strategy"] == name and r["error_percent"] is not None]
        errors = [row["error_percent"] for row in own]
        seeds = [row["seed"] for row in own]
        plain = [r for r in rows if r["strategy"] == "sgd" and r["seed"] in seeds]
        seconds = [sum(r["train_seconds"] for r in those) for those in (plain, own)]
        summary.append(
            {
                "strategy": name,
                "error_percent_mean": fmean(errors) if errors else None,
                "error_percent_std": stdev(errors) if len(errors) > 1 else None,
                "speedup": seconds[0] / seconds[1] if errors else None,
            }
        )
    versions = {"torch": "2.15"}
    record = {"runs": rows, "summary": summary, "device": "cpu (1 threads)", "versions": versions}
    return {**record, "compile": False}


def published(paper, number, errors, folder, capsys, told=None, data="fake", **options):
    """Reproduce a table with made-up runs, and return what is printed, and the results."""
    table, heard = find_table(paper, number), []
    cells = choose_cells(table, data, **options)
    settings = {model: settings_of(table, model, data, told) for model in cells}

    def train(model, own, settings, on_seed):
        runs = [(c.name, seed, error, 8.0 - seed) for c in own for seed, error in enumerate(errors)]
        on_seed(make_results([run for run in runs if run[1] == 0]))
        return make_results(runs)

    results = reproduce(table, cells, settings, train, heard.append, width=4)
    assert heard[-1] == results and len(heard) == 2 * len(cells)
    page = publish_table(table, results, fake_data(), folder, 4)
    return capsys.readouterr().out, page.read_text(), results
