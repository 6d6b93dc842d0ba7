"""What a person reads: printed graphs, diffs, explanations, and what the environment adds."""

import ast
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support.nets import NETS
from torch import fx, nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, schedules
from fxlocal.compiler.debug import ENVIRONMENT
from fxlocal.facts import Block, ConvGeometry, Cost, Layer, SkipEdge
from fxlocal.inspection.explain import explain
from fxlocal.ir.nodes import Origin
from fxlocal.ir.text import diff_graphs, format_graph

LOCAL = Plan(local=LocalPrefix(until=1, rule=Hebbian(0.5)))


class Everything(nn.Module):
    """Each opcode, keyword arguments, nested containers, a context."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x, y):
        x = F.dropout(self.fc(x), p=0.5, training=self.training) * self.scale
        with torch.no_grad():
            z = torch.cat([x, x[:, 1:]], dim=1).clamp(min=y)
        return {"a": (x,), "b": [z, None], "c": z.size(0)}


# --- format_graph, diff_graphs -------------------------------------------------------------------


def test_each_node_is_a_line():
    assert_expected_inline(
        format_graph(fxlocal.capture(Everything())),
        """\
%x = placeholder x
%y = placeholder y
%fc = call_module fc(%x)
%dropout = call_function dropout(%fc, p=0.5, training=True, inplace=False)
%scale = get_attr scale
%mul = call_function mul(%dropout, %scale)
with torch.no_grad():
%getitem = call_function getitem(%mul, (slice(None, None, None), slice(1, None, None)))
%cat = call_function cat([%mul, %getitem], dim=1)
%clamp = call_method clamp(%cat, min=%y)
end torch.no_grad()
%size = call_method size(%clamp, 0)
output {'a': (%mul,), 'b': [%clamp, None], 'c': %size}""",
    )


def test_shapes_are_shown_where_they_are_known():
    captured = fxlocal.capture(nn.Sequential(nn.Linear(4, 2)))
    _, fc, _ = captured.graph.nodes
    fc.meta["val"] = torch.empty(3, 2, dtype=torch.bfloat16)
    assert format_graph(captured).splitlines()[1] == (
        "%_0: bfloat16[3, 2] = call_module 0(%input_1)"
    )


def test_text_is_free_of_addresses_and_the_same_in_every_run():
    first, second = (format_graph(fxlocal.transform(Everything(), Plan())) for _ in range(2))
    assert first == second
    assert "0x" not in first


def test_diff_is_what_changed_and_nothing_else():
    before = fxlocal.capture(NETS["chain"].build())
    after = before.clone()
    assert diff_graphs(before, after) == ""
    fc = next(node for node in after.graph.nodes if node.name == "fc")
    fc.target = "other"
    assert diff_graphs(before, after) == (
        "-%fc = call_module fc(%mean)\n+%fc = call_module other(%mean)"
    )


def test_plain_graph_modules_can_be_printed():
    text = format_graph(fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    assert text == "%input_1 = placeholder input\n%_0 = call_module 0(%input_1)\noutput %_0"


# --- explain -------------------------------------------------------------------------------------


def test_explain_is_the_plan_and_a_diff_per_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert_expected_inline(
        explain(fxlocal.transform(model, LOCAL)),
        """\
Plan(local=LocalPrefix(until=1, rule=Hebbian(rate=0.5, relative=False), norm='train'))

1. insert_local_updates(start='_1', layers=<1>, skips=<0>, rule=Hebbian(rate=0.5, relative=False))
+%rate = get_attr fxlocal.rate  # insert_local_updates @0
+%_0_weight = get_attr 0.weight  # insert_local_updates @0
+%_0_delta = call_function fxlocal.linear_delta(%input_1, %_0, %_0_weight)  # insert_local_updates @0
+%_0_update = call_function fxlocal.normalised_add_(%_0_weight, %_0_delta, %rate)  # insert_local_updates @0

2. insert_cuts(start='_1', layer='1')
-%_1 = call_module 1(%_0)
+%detach = call_method detach(%_0)  # insert_cuts @1
+%_1 = call_module 1(%detach)

3. insert_no_grad(start='_1')
+with torch.no_grad():
+end torch.no_grad()""",  # noqa: E501
    )


def test_explain_of_nothing_says_so():
    network = fxlocal.transform(NETS["chain"].build(), Plan())
    assert explain(network) == "Plan()\n\nno pass ran: the network is the source model"


def test_explain_looks_through_the_compiled_wrapper():
    network = fxlocal.transform(NETS["chain"].build(), LOCAL)
    assert explain(torch.compile(network, backend="eager")) == explain(network)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), fx.symbolic_trace(nn.ReLU())])
def test_explain_refuses_what_fxlocal_did_not_make(module):
    with pytest.raises(
        TypeError, match=r"cannot explain a .*: give what fxlocal.transform returned"
    ):
        explain(module)


# --- what prints pastes back ---------------------------------------------------------------------

VALUES = [
    Plan(),
    Plan(local=LocalPrefix("layer1.0", Hebbian(1e-3), "eval")),
    Plan(local=LocalPrefix(0.5, Freeze())),
    Origin("insert_cuts", "conv1"),
    Layer(1, "a.b", "conv", "a_b", None, "x", ConvGeometry((1,), (0,), (1,), 1)),
    SkipEdge("a", "b", "residual", False, "a", True),
    Block("layer1", (1, 2), "conv1"),
    Cost(1, 2, 3),
    schedules.Static(epochs=3, curve="linear", rule=Freeze(), rate_decay=(0.5, 2)),
    schedules.Constant(LOCAL),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_repr_is_one_line_that_pastes_back(value):
    names = {**vars(fxlocal), **vars(schedules), "Origin": Origin, "ConvGeometry": ConvGeometry}
    again = eval(repr(value), names)
    assert again == value and type(again) is type(value)
    assert hash(again) == hash(value)
    assert "\n" not in repr(value)


@pytest.mark.parametrize("name", ["unet", "functional"])
def test_facts_of_a_model_paste_back(name):
    analysis = fxlocal.analyze(NETS[name].build(), *NETS[name].inputs())
    names = {name: getattr(fxlocal, name) for name in fxlocal.__all__}
    names["ConvGeometry"] = ConvGeometry
    assert eval(repr(analysis), names) == analysis


# --- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["", "0", "1", "2", "3"])
def test_debug_prints_on_stderr(level, monkeypatch, capsys):
    monkeypatch.setenv("FXLOCAL_DEBUG", level)
    network = fxlocal.transform(NETS["chain"].build(), LOCAL)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    if level in ("", "0"):
        assert lines == []
        return
    counts = [line for line in lines if line.startswith("fxlocal ")]
    assert counts == [
        "fxlocal 00 capture: +0 -0 lines",
        "fxlocal 01 insert_local_updates: +4 -0 lines",
        "fxlocal 02 insert_cuts: +2 -1 lines",
        "fxlocal 03 insert_no_grad: +2 -0 lines",
    ]
    rest = [line for line in lines if line not in counts]
    if level == "1":
        assert rest == []
    if level == "2":
        diffs = "\n".join(record.diff for record in network.meta["fxlocal"].records)
        assert [line for line in rest if line] == diffs.splitlines()
    if level == "3":
        text = format_graph(network).splitlines()
        assert rest[-len(text) :] == text
        assert not [line for line in rest if line.startswith(("+", "-"))]


def test_dump_writes_the_graph_after_each_pass(monkeypatch, tmp_path):
    folder = tmp_path / "made" / "here"
    monkeypatch.setenv("FXLOCAL_DUMP", str(folder))
    model = NETS["chain"].build()
    network = fxlocal.transform(model, LOCAL)
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(texts) == [
        "00_capture.txt",
        "01_insert_local_updates.txt",
        "02_insert_cuts.txt",
        "03_insert_no_grad.txt",
    ]
    assert texts["00_capture.txt"] == format_graph(fxlocal.capture(model)) + "\n"
    assert texts["03_insert_no_grad.txt"] == format_graph(network) + "\n"


def test_skip_leaves_passes_out_and_warns_of_each(monkeypatch):
    monkeypatch.setenv("FXLOCAL_SKIP", "insert_local_updates, insert_no_grad")
    with pytest.warns(UserWarning, match="FXLOCAL_SKIP leaves out the pass") as caught:
        network = fxlocal.transform(NETS["chain"].build(), LOCAL)
    left_out = [str(w.message).split()[-1] for w in caught]
    assert left_out == ["insert_local_updates", "insert_no_grad"]
    assert [record.name for record in network.meta["fxlocal"].records] == ["insert_cuts"]
    assert "no_grad" not in network.code and "rate" not in network.additions


def test_environment_is_read_in_one_place():
    """So that one table can list it: docs/debugging.md."""
    root = Path(fxlocal.__file__).parent
    readers = {
        path.relative_to(root).as_posix()
        for path in (*root.rglob("*.py"), *root.parent.glob("passes/*.py"))
        if "experiments" not in path.parts  # where ranks hear from torchrun by its variables
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"compiler/debug.py"}
    text = (root / "compiler/debug.py").read_text()
    assert set(ENVIRONMENT) == set(re.findall("FXLOCAL_[A-Z]+", text))


def test_a_record_is_pickled_as_its_text():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    first, again = (fxlocal.transform(model, Plan(local=LocalPrefix("2"))) for _ in range(2))
    kept = pickle.loads(pickle.dumps(first.meta["fxlocal"]))
    assert [r.diff for r in kept.records] == [r.diff for r in again.meta["fxlocal"].records]
