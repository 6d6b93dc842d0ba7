"""A pruned run: what it records, shows and resumes."""

import pytest
from support.tiny import (
    SETTINGS,
    fake_data,
    interrupted,
    resnet,
    run,
    same_state,
    schedule_of,
    small_comparison,
    text_of,
)

from fxlocal.experiments.report.charts import draw_charts
from fxlocal.experiments.report.tables import comparison_table
from fxlocal.experiments.training.specs import StrategyError, parse_spec

# A threshold that a few of the weights of so small a net are below at once.
SPEC = "prune-train(share=0.9,every=1,threshold=0.4)"


def test_compares_what_each_cut_saves():
    results = small_comparison(["sgd", SPEC]).to_json()
    plain, pruned = results["runs"]
    assert len(set(plain["flops"])) == 1
    assert pruned["flops"][0] == plain["flops"][0]
    assert pruned["flops"] == sorted(pruned["flops"], reverse=True)
    assert pruned["flops"][-1] < 0.9 * pruned["flops"][0]
    assert pruned["saved_bytes"][-1] < 0.8 * pruned["saved_bytes"][0]
    assert pruned["saved_bytes"][0] < 1.01 * plain["saved_bytes"][0]  # the penalty's few
    # The prediction of an epoch is made of the network that it trains.
    for predicted, measured in list(
        zip(pruned["predicted_bytes"], pruned["saved_bytes"], strict=True)
    )[1:]:
        assert abs(predicted / measured - 1) < 0.05
    first, last = pruned["flops"][0] / 1e6, pruned["flops"][-1] / 1e6
    shown = text_of(comparison_table(results, 9), width=120)
    assert f"MFLOPs of {SPEC}, forward: {first:.1f} -> {last:.1f}" in shown
    assert "MFLOPs of sgd" not in shown
    assert "FLOPs" in [chart.title for chart in draw_charts(results)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("epochs", [1, 3])
def test_resumes_exactly_after_cuts(tmp_path, epochs):
    schedule, path = schedule_of(SPEC), tmp_path / "run.pt"
    whole, broken, again = resnet(), resnet(), resnet()
    unbroken = run(whole, schedule)
    interrupted(path, epochs, broken, schedule)
    resumed = run(again, schedule, checkpoint=path, resume=True)
    assert same_state(dict(whole.state_dict()), dict(again.state_dict()))
    for name in ("loss", "errors", "flops", "saved_bytes", "predicted_bytes"):
        assert getattr(resumed, name) == getattr(unbroken, name)
    assert sum(p.numel() for p in whole.parameters()) < sum(
        p.numel() for p in resnet().parameters()
    )


def test_the_penalty_is_part_of_the_loss_that_moves_weights_and_not_of_the_one_shown():
    plain, penalised = resnet(), resnet()
    data = fake_data(num_train=SETTINGS.batch_size)  # one step
    settings = {"data": data}
    first = run(plain, schedule_of("sgd"), **settings).loss[0]
    assert run(penalised, schedule_of("prune-train(every=9)"), **settings).loss[0] == first
    norms = [
        sum(p.norm() for p in model.parameters() if p.dim() > 1) for model in (plain, penalised)
    ]
    assert norms[1] < norms[0]


@pytest.mark.parametrize("told", ["share=1.0", "share=0.0", "every=0", "threshold=0.0"])
def test_refuses_options_out_of_range(told):
    with pytest.raises(StrategyError, match=f"prune-train.*{told}"):
        parse_spec(f"prune-train({told})").schedule(4)


def test_joins_no_other_strategy():
    with pytest.raises(StrategyError, match="contradict each other"):
        parse_spec("freeze+prune-train")
