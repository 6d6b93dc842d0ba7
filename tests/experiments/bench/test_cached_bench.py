"""Epochs with a cache of a frozen prefix, in turns."""

from support.tiny import text_of

from fxlocal.experiments.bench.cached import bench_cache
from fxlocal.experiments.bench.turns import build_job
from fxlocal.experiments.report.bench_tables import cached_table
from fxlocal.experiments.training.settings import Machine


def test_rows_and_ratios():
    job = build_job("resnet8", Machine(threads=1), input_size="8", batch=4, classes=3, width=8)
    results = bench_cache(job, [3], "1MiB", batches=3, repeats=1)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["sgd", "uncached", "cold", "warm", "limit"]
    assert rows["sgd"]["of_sgd"] == rows["uncached"]["of_uncached"] == 1.0
    warm, limit = rows["warm"], rows["limit"]
    assert warm["of_limit"] == warm["seconds"] / limit["seconds"]
    assert "12 samples" in results["cache"][0] or "not used" in results["cache"][0]
    told = text_of(cached_table(results))
    assert "12 images an epoch" in told and "3 of 10" in told
