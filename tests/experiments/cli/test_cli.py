"""The command line as a new user meets it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from support.shell import FAKE, TINY, fails, fxlocal, succeeds

from fxlocal.experiments.cli.app import VERBS

pytestmark = pytest.mark.usefixtures("unrendered", "in_an_empty_folder")


# compare


def test_compare_prints_a_table_and_writes_a_folder(tmp_path):
    text = succeeds("compare", *TINY, "--seeds", "0,1")
    for word in ("error %", "train s", "of SGD's", "kept MiB", "boundary"):
        assert word in text
    for name in ("sgd", "local-static", "freeze"):
        row = rf"^{name} +\d+\.\d\d \+- \d+\.\d\d +\d+\.\d +~?\d\.\d\d "
        assert re.search(row, text, re.MULTILINE), text
    folder = tmp_path / "runs" / "compare-fake-resnet8"
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) == 6 and results["width"] == 4
    assert results["options"]["freeze"]["freeze"]["curve"] == "quadratic"
    assert results["settings"]["batch_size"] == 16
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "batch_size 16" in page
    assert (folder / "blocks.svg").read_text() in page
    assert results["commit"] in page and results["host"] in page


@pytest.mark.slow
def test_compare_runs_digits_with_no_other_data(tmp_path):
    options = ("--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "256")
    succeeds("compare", *options, "--seeds", "0", "--strategies", "sgd", "--out", "o")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["data"] == "digits"


def test_compare_leaves_a_folder_with_something_in_it_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "mine is not empty" in fails("compare", *TINY, "--out", "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    succeeds("compare", *TINY, "--strategies", "sgd", "--out", "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert "is not a folder" in fails("compare", *TINY, "--out", "mine/thesis.txt")


def test_compare_reports_divergence_and_still_writes_results(tmp_path):
    line = fails("compare", *TINY, "--lr", "1e30", "--seeds", "0", "--out", "o", code=1)
    assert "sgd, seed 0, in epoch" in line
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert {run["error_percent"] for run in results["runs"]} == {None}
    assert (tmp_path / "o" / "report.html").exists()


@pytest.mark.slow
def test_compare_trains_a_smaller_model_beside_the_strategies(tmp_path):
    options = ("--model", "resnet14", "--strategies", "sgd,resnet8,freeze+zero", "--seeds", "0")
    text = succeeds("compare", *TINY, *options, "--out", "o")
    assert re.search(r"^resnet8 .* -$", text, re.MULTILINE)
    assert "sgd on another model: resnet8" in text
    runs = json.loads((tmp_path / "o" / "results.json").read_text())["runs"]
    assert [run["strategy"] for run in runs] == ["sgd", "freeze+zero", "resnet8"]
    assert "But resnet8: plain sgd" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.slow
def test_compare_with_growing_batches_says_how_they_grew(tmp_path):
    options = (*TINY, "--epochs", "4", "--seeds", "0", "--strategies", "sgd,freeze(start=0.25)")
    text = succeeds("compare", *options, "--grow-batch", "--out", "o")
    assert "Growing batches" in text
    assert re.search(r"^freeze.* +16 -> 64 +\d+ +\d\.\d +\d\.\d +\d\.\d%", text, re.MULTILINE), text
    assert "images per second" in (tmp_path / "o" / "report.html").read_text()


# train


def test_train_writes_results_and_a_checkpoint_that_resumes(tmp_path):
    text = succeeds("train", *TINY, "--out", "run")
    assert "boundary at layer" in text
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "not empty" in fails("train", *TINY, "--out", "run")
    succeeds("train", *TINY, "--out", "run", "--resume")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == first


def test_resume_of_another_run_is_refused(tmp_path):
    succeeds("train", *TINY, "--out", "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    resume = ("--out", "run", "--resume")
    assert "'freeze' here" in fails("train", *TINY, *resume, "--strategy", "freeze")
    assert "epochs is 2 there and 3 here" in fails("train", *TINY, *resume, "--epochs", "3")
    assert "another model" in fails("train", *TINY, *resume, "--model", "resnet14")
    assert "no checkpoint at" in fails("train", *TINY, "--out", "elsewhere", "--resume")
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_train_stops_at_divergence():
    line = fails("train", *TINY, "--lr", "1e30", "--strategy", "sgd", code=1)
    assert re.search(r"loss is (nan|inf) in epoch \d of sgd, seed 0; try", line)


# bench


def test_bench_prints_a_table_and_writes_json(tmp_path):
    text = succeeds(
        *("bench", "resnet8", "--batch", "2", "--input-size", "8", "--repeats", "1"),
        *("--boundaries", "0.5,layer3,1", "--out", "b.json"),
    )
    assert "of SGD's" in text and "6 of 10" in text
    results = json.loads((tmp_path / "b.json").read_text())
    assert [row["boundary"] for row in results["rows"]] == [0, 3, 3, 6, 6, 1, 1]


def test_bench_takes_strategies_and_plots_local_modules(tmp_path):
    specs = "zero(approximate=schedule-2),greedy(modules=2),summed(modules=2)"
    text = succeeds(
        *("bench", "resnet8", "--batch", "2", "--input-size", "8", "--repeats", "1"),
        *("--strategies", specs, "--out", "b.json", "--plots", "p"),
    )
    assert "summed(" in text and "..." not in text
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["sgd", *specs.split(",")]
    assert [row["method"] for row in rows] == [None, None, "greedy", "summed"]
    assert (tmp_path / "p" / "memory_over_modules.png").exists()


# reproduce


def test_reproduce_alone_lists_papers_and_tables():
    lines = succeeds("reproduce").splitlines()
    assert any(re.match(r"backlink +2 +errors in percent", line) for line in lines)
    assert "gradient-approximation" not in succeeds("reproduce", "backlink")


def test_reproduce_runs_a_table_and_sets_ours_beside_the_papers(tmp_path):
    options = ("--width", "4", "--epochs", "1", "--batch-size", "16", "--seeds", "0")
    told = ("--set", "k=2", "--rows", "topk, schedule 1", "--rows", "resnet14", "--out", "o")
    text = succeeds("reproduce", "gradient-approximation", "3", *FAKE, *options, *told)
    assert re.search(r"^topk, schedule 1 .* 0.75 .* 3.5$", text, re.MULTILINE), text
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    names = ["sgd", "topk, schedule 1", "resnet14"]
    assert [run["strategy"] for run in results["networks"]["resnet20"]["runs"]] == names
    assert results["rows"][1]["arguments"]["k"] == 2
    assert (tmp_path / "o" / "gradient-approximation-3.md").exists()


# Bad input


@pytest.mark.sample(34)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--strategies", "sgd,frozen"), "unknown strategy 'frozen'.*'freeze'"),
        (("compare", "--seeds", "0,x"), "--seeds '0,x'"),
        (("compare", "--model", "resnet19"), "'resnet19'.*'resnet18'"),
        (("compare", "--data", "digit"), "'digit'.*'digits'"),
        (("compare", "--data", "folder:nowhere"), "nowhere"),
        (("compare", "--data", "cifar10"), "cifar10.*--download"),
        (("compare", "--model", "torchvision:resnet18"), "3 channels"),
        (("compare", "--strategies", "freeze(largest=2)"), "largest=2"),
        (("compare", "--epochs", "0"), "epochs=0"),
        (("compare", "--batch-size", "5000"), "5000"),
        (("compare", "--memory-budget", "0.01"), "memory_budget=0.01: the smallest batch, of 64"),
        (("train", "--memory-budget", "0.01"), "memory_budget=0.01: .* raise the budget"),
        (("train", "--memory-budget", "-1"), "memory_budget=-1"),
        (("compare", "--strategies", "sgd,sgd-same-time"), "no strategy to match in sgd"),
        (("compare", "--strategies", "freeze,sgd-same-error"), "add sgd to freeze"),
        (("train", "--strategy", "sgd-same-time"), "unknown strategy 'sgd-same-time'"),
        (("compare", "--strategies", "sgd,resnet14"), "resnet14 among --strategies is the --model"),
        (("compare", "--strategies", "sgd,resnet15"), "unknown strategy 'resnet15'.*'resnet14'"),
        (("compare", "--strategies", "resnet8,resnet8"), "resnet8 comes twice"),
        (("compare", "--strategies", "sgd,unet"), "images of 1x8x8: .*multiples of 16"),
        (("compare", "--strategies", "sgd,torchvision:alexnet"), "3 channels"),
        (("compare", "--strategies", "resnet8,sgd,sgd-same-time"), "no strategy to match"),
        (("compare", "--strategies", "sgd(k=2),resnet8"), "sgd has no argument 'k'"),
        (("compare", "--strategies", "sgd,zero+topk"), "'zero.topk': its parts contradict"),
        (("compare", "--strategies", "sgd,freeze+zoro"), "'zoro' in 'freeze.zoro'. .*'zero'"),
        (("compare", "--strategies", "zero(force=true)"), "zero has no argument 'force'"),
        (("compare", "--strategies", "freeze(plateau=2)"), "freeze has no argument 'plateau'"),
        (("train", "--strategy", "freeze(rate=1)+zero"), "freeze has no argument 'rate'"),
        (("train", "--strategy", "topk(weak_supervision=false)"), "no argument 'weak_sup"),
        (("train", "--strategy", "topk(std=1)"), "topk has no argument 'std'"),
        (("train", "--strategy", "topk(k=0)"), "'topk.k=0.': TopK.k=0.: give a whole number"),
        (("train", "--strategy", "topk(k=65)"), "k=65.*make k smaller"),
        (("train", "--strategy", "resnet8"), "'resnet8' is a model: fxlocal compare"),
        (("sweep", "--strategy", "resnet8", "--vary", "k=1,2"), "'resnet8' is a model: fxlocal"),
        (("sweep", "--strategy", "zero", "--vary", "k=1,2"), "--vary 'k=1,2': zero has no argum"),
        (("compare", "--out", "/proc/fxlocal"), "cannot write into /proc/fxlocal: "),
        (("compare", "--strategies", "sgd,freeze(rate=1)"), "freeze has no argument 'rate'"),
        (("train", "--strategy", "local-static(average=window)"), "no argument 'average'"),
        (("train", "--strategy", "sgd(largest=0.5)"), "sgd has no argument 'largest'"),
        (("train", "--strategy", "freeze(c1=1,c2=1,start=0)"), "start=0.0: changes nothing beside"),
        (("train", "--grow-lr", "sqrt"), "--grow-lr: no batch grows"),
        (("train", "--optimizer", "adam", "--momentum", "0.5"), "--momentum: adam has none"),
        (("compare", "--device", "abacus"), "'abacus'"),
        (("train", "--strategy", "local"), "'local'.*'local-static'"),
        (("show", "resnet8", "--until", "layer9"), "'layer9'.*layer3"),
        (("show", "resnet8", "--until", "99"), "until=99"),
        (("show", "resnet8", "--until", "1.5"), "until=1.5"),
        (("show", "resnet8", "--strategy", "local-static(rate=-1)"), "rate=-1"),
        (("show", "resnet8", "--until", "1", "--strategy", "sgd"), "give one of them"),
        (("show", "resnet8", "--input-size", "big"), "--input-size 'big'"),
        (("show", "unet", "--input-size", "20"), "images of 3x20x20: .*multiples of 16"),
        (("train", "--model", "unet"), "images of 1x8x8: .*multiples of 16"),
        (("show", "no.such.module:net"), "no.such"),
        (("bench", "resnet8", "--boundaries", "layer9"), "'layer9'"),
        (("bench", "resnet8", "--strategies", "sgd", "--boundaries", "1"), "there are no prefixes"),
        (("train", "--nproc", "99999"), "--nproc 99999: this machine has .* cores; give fewer"),
        (("bench", "resnet8", "--plots", "x"), "give --strategies, or --nproc"),
        (("bench", "resnet8", "--wires", "5"), "--wires: there are none without --nproc"),
        (("bench", "resnet8", "--errors", "x"), "--errors: changes nothing without --plots"),
        (
            ("bench", "resnet8", "--strategies", "greedy,topk", "--nproc", "2"),
            "topk has no local modules",
        ),
        (
            ("bench", "resnet8", "--strategies", "greedy", "--nproc", "2", "--wires", "5"),
            "with --nproc they are of data parallel training",
        ),
        (("reproduce", "backlnk"), "unknown paper 'backlnk'. Nearest: 'backlink'"),
        (("reproduce", "backlink", "7"), "backlink has no table '7'; it has 1, 2"),
        (("reproduce", "backlink", "1", "--set", "k=2"), "--set k: changes nothing"),
        (("reproduce", "backlink", "1", "--set", "k"), "--set 'k': give NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_clear_line_and_writes_nothing(arguments, message, tmp_path):
    assert re.search(message, fails(*arguments))
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_memory_gets_one_clear_line(monkeypatch):
    def exhaust(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr("fxlocal.experiments.cli.train.train_run", exhaust)
    assert "2 GiB. make --batch-size smaller" in fails("train", *TINY)


@pytest.mark.slow
def test_membranes_are_compared_with_calling_all_of_it_foreground(tmp_path):
    data = ("--data", "membranes", "--num-train", "8", "--num-test", "4", "--size", "16")
    options = ("--model", "unet", "--width", "2", "--epochs", "1", "--batch-size", "4")
    text = succeeds("compare", *data, *options, "--strategies", "sgd", "--seeds", "0")
    assert re.search(r"^all foreground: 1 - Dice \d+\.\d\d %$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_picture_names_the_rule_of_any_local_strategy(tmp_path):
    options = ("--strategies", "local-dynamic(rule=oja,alpha=1)", "--seeds", "0", "--out", "o")
    succeeds("compare", *TINY, *options, "--epochs", "3")
    page = (tmp_path / "o" / "report.html").read_text()
    assert "frozen</text>" not in page and "Hebbian" not in page
    assert "local rule (Oja, rate" in page


def test_model_that_cannot_be_captured_gets_one_clear_line(tmp_path):
    (tmp_path / "branching.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(8, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.mean((1, 2))\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n"
    )
    for command in (("show",), ("train", *FAKE, "--model")):
        result = fxlocal(*command, "branching:Net")
        assert result.exit_code == 2
        last_line = result.stderr.splitlines()[-1]  # torch.export logs its own complaints before
        assert last_line.startswith("error: ") and "if x.sum() > 0" in last_line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_gpu_is_said_in_one_line():
    assert "'cuda'" in fails("bench", "resnet8", "--device", "cuda")


def test_help_lists_the_verbs_without_importing_torch():
    code = "import sys; from fxlocal.experiments.cli.app import app\ntry: app(['--help'])\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *page, imported = done.stdout.splitlines()
    assert imported == "False"
    found = [line.split()[1] for line in page if re.match(r"\W+ (\w+)  +[A-Z]", line)]
    assert found == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_on_one_screen(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = succeeds(verb, "--help")
    assert " ".join(VERBS[verb].split()) in " ".join(page.split())
    assert (len(page.splitlines()) <= 50 and "--out" in page) or verb in ("show", "export")
