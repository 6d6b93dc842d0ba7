"""What a shell asks of the command line itself, and what is made of a run that has been trained."""

import inspect
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support.shell import TINY, fails, fxlocal, succeeds
from torch import nn
from torchvision.transforms import v2
from typer.models import OptionInfo
from typer.testing import CliRunner

import fxlocal as library
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan
from fxlocal.experiments import compare
from fxlocal.experiments.cli.app import PANELS, VERBS, app
from fxlocal.experiments.cli.options import ImageChoice, ModelChoice
from fxlocal.experiments.cli.trained.run import open_run
from fxlocal.experiments.data.catalogue import load_data
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.checkpoint import read_checkpoint
from fxlocal.experiments.training.settings import Machine, Settings
from fxlocal.schedules import Static

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_version_is_the_installed_ones():
    assert succeeds("--version").startswith(f"fxlocal {library.__version__}, torch ")
    assert library.__version__[0].isdigit() and not hasattr(library, "__versions__")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tr", {"train"}),
        ("train --ep", {"--epochs"}),
        ("train --resume nowhere --se", {"--seed"}),
        ("compare --pca", {"--pca"}),
        ("train --optimizer a", {"adam", "adamw"}),
        ("export r f --ov", {"--overwrite"}),
    ],
)
def test_a_shell_completes_verbs_and_options_and_hears_nothing_else(words, found, monkeypatch):
    # A verb would import torch.
    monkeypatch.setattr("fxlocal.experiments.cli.app.import_module", pytest.fail)
    told = {"COMP_WORDS": f"fxlocal {words}", "COMP_CWORD": str(len(words.split()))}
    told["_FXLOCAL_COMPLETE"] = "complete_bash"
    result = CliRunner().invoke(app, [], prog_name="fxlocal", env=told)
    assert {*result.stdout.split()} == found and not result.stderr


def options_of(verb):
    """What a shell is told of each option of a verb: its kind, or words, and its help."""
    place = "trained." if verb in PANELS["Use what is trained"] else ""
    command = import_module(f"fxlocal.experiments.cli.{place}{verb}").command
    hints = get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        kind, *told = get_args(hints[name]) if get_origin(hints[name]) is Annotated else [None]
        if told and isinstance(told[0], OptionInfo) and not told[0].hidden:
            kinds = {kind, *get_args(kind)}
            found = "flag" if bool in kinds else "path" if Path in kinds else "text"
            words = list(get_args(kind)) if get_origin(kind) is Literal else found
            flag = told[0].param_decls or (f"--{name.replace('_', '-')}",)
            yield flag[0], [words, told[0].help]


def test_what_a_shell_is_told_are_the_verbs_options():
    """With EXPECTTEST_ACCEPT=1, write them."""
    path = Path(library.__file__).parent / "experiments/cli/completion.json"
    found = {verb: dict(options_of(verb)) for verb in VERBS}
    text = "{\n" + ",\n".join(
        f'"{verb}": {{\n'
        + ",\n".join(f"{json.dumps(flag)}: {json.dumps(told)}" for flag, told in options.items())
        + "\n}"
        for verb, options in found.items()
    )
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text + "\n}\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == found


def test_the_help_groups_the_verbs():
    page = succeeds("--help")
    places = [page.index(f" {name} ") for panel in PANELS for name in (panel, *PANELS[panel])]
    assert places == sorted(places)


# What is made of a trained model


class Photographs:
    """A folder of them, a run that has learned them, and by hand what it sees in each."""

    def __init__(self, root):
        for i in range(24):
            split, name = ("train", "val", "test")[i // 8], ("cat", "dog")[i % 2]
            path = root / "photos" / split / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (24, 30 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        self.model = build_model("resnet8", num_classes=2, width=4, seed=5).eval()
        write_run(root / "run", load_data("folder:photos", size=16), self.model)

    def probabilities(self, path):
        image = v2.functional.center_crop(v2.functional.resize(Image.open(path), 18), [16, 16])
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.no_grad():
            return self.model(normal[None])[0].softmax(0).tolist()

    def table(self, split):
        """Precision, recall and F1 of each class, by counting."""
        found = [
            (path.parent.name, max(zip(self.probabilities(path), ("cat", "dog"), strict=True))[1])
            for path in Path("photos", split).rglob("*.png")
        ]
        for name in ("cat", "dog"):
            hits = sum(true == seen == name for true, seen in found)
            named, those = (sum(pair[i] == name for pair in found) for i in (1, 0))
            share = [hits / n if n else None for n in (named, those)]
            f1 = 2 * hits / (named + those)
            yield [None if v is None else pytest.approx(100 * v) for v in (*share, f1)], those


def write_run(folder, data, model, verb="train", width=4):
    folder.mkdir()
    options = [
        ImageChoice("folder:photos", size=16),
        ModelChoice("resnet8", width),
        Settings(),
        Machine(),
    ]
    told = {name: value for one in options for name, value in asdict(one).items()}
    job = {"verb": verb, "fxlocal": "0", "options": told | {"seed": 3}, "data": data.facts}
    (folder / "job.json").write_text(json.dumps(job))
    if model is not None:
        torch.save(model.state_dict(), folder / "best.pt")
    return folder


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Photographs(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_counts_by_class(split, photographs):
    given = [] if split == "val" else ["photos/test"]
    if given:
        shutil.rmtree("photos/train")  # which are not needed
    text = succeeds("evaluate", "run", *given, "--out", "e.json")
    found = json.loads(Path("e.json").read_text())
    rows = [[row[n] for n in ("precision", "recall", "f1")] for row in found["classes"]]
    expected = list(photographs.table(split))
    assert rows == [shares for shares, _ in expected]
    right = sum(shares[1].expected * those for shares, those in expected) / 8
    assert f"accuracy {right:.2f} % of 8 images; best.pt, of least error" in text


def test_predict_prepares_images_as_they_were_learned(photographs):
    shutil.rmtree("photos/train")
    Path("photos/val/cat/0.png").write_text("no image")
    assert "val/cat/0.png" in fails("predict", "run", "photos/val")
    told = ("photos/val", "photos/test/dog/17.png", "--skip-damaged", "--out", "p.json")
    result = fxlocal("predict", "run", *told)
    assert result.stderr == "note: 1 damaged file left out\n"
    rows = json.loads(Path("p.json").read_text())["images"]
    assert len(rows) == 9 and rows[-1]["file"] == "photos/test/dog/17.png"
    for row, line in zip(rows, result.stdout.splitlines(), strict=True):
        expected = dict(zip(("cat", "dog"), photographs.probabilities(row["file"]), strict=True))
        assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
        best = max(expected, key=expected.get)
        assert line == f"{row['file']}  {best}  {100 * expected[best]:.1f} %"


def test_export_writes_the_plain_weights(photographs):
    text = succeeds("export", "run", "model.safetensors")
    assert text.startswith("model.safetensors: resnet8, best.pt, of least error, ")
    found, own = load_file("model.safetensors"), photographs.model.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)
    with safe_open("model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fxlocal"])
    assert facts["classes"] == ["cat", "dog"] and facts["shape"] == [3, 16, 16]


WRONG = [
    ("evaluate nowhere", "nowhere has no trained model: job.json"),
    ("evaluate photos", "photos has no trained model: job.json"),
    ("evaluate compared", "compared: fxlocal compare keeps no weights; train does"),
    ("evaluate untrained", "untrained has no best.pt and no checkpoint.pt: nothing is learned"),
    ("evaluate older", "written by fxlocal 0, which noted less or else of a run: 'data'"),
    ("evaluate wider", r"wider.best.pt is of another model .*: \d+ tensors of \d+ not there"),
    ("export damaged x.pt2", "damaged.best.pt is damaged: "),
    ("predict cut photos", "cut.checkpoint.pt is not a checkpoint of fxlocal train: it does not"),
    ("evaluate run photos", "photos.test is of no class that the model has learned. Nearest"),
    ("evaluate run photos/val/cat", "val.cat has no class folders: give"),
    ("evaluate run --device abacus", "'abacus' cannot be used here"),
    ("evaluate run --out run", "--out run is a folder"),
    ("predict run photoz", "photoz: there is no such file or folder. Nearest: 'photos'"),
    ("predict run older", "older holds no images"),
    ("predict run run/job.json", "cannot read run.job.json"),
    ("predict pixels photos", "pixels was to label pixels"),
    ("predict fake photos", "not known how fake makes its images .* of files"),
    ("export run model.h5", "model.h5: no format has the suffix 'h5'. Nearest: "),
    ("export run model --format pt3", "--format pt3. Nearest: 'pt2'"),
    ("export run taken.pt2", "taken.pt2 is there already; give another file, or --overwrite"),
    ("export run photos --format pt2", "photos is a folder"),
    ("export run /proc/x.pt2", "cannot write into /proc: "),
]


def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(photographs):
    data, model = load_data("folder:photos", size=16), photographs.model
    here = Path()
    write_run(here / "compared", data, model, "compare")
    write_run(here / "untrained", data, None)
    write_run(here / "wider", data, model, width=8)
    write_run(here / "pixels", replace(data, task="segmentation"), model)
    write_run(here / "fake", replace(data, name="fake", statistics=None), model)
    for name, file in (("damaged", "best.pt"), ("cut", "checkpoint.pt")):
        (write_run(here / name, data, None) / file).write_bytes(b"PK\3\4, and no more")
    job = json.loads((write_run(here / "older", data, model) / "job.json").read_text())
    del job["data"]
    (here / "older" / "job.json").write_text(json.dumps(job))
    (here / "taken.pt2").write_text("precious")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for words, message in WRONG:
        assert re.search(message, fails(*words.split())), words
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--ema 0.9",
        "--keep-best",
        "--strategy greedy(modules=2)",
        "--strategy prune-train(every=1,threshold=0.5)",
    ],
)
def test_what_a_run_learned_is_judged_as_the_run_did(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("train", *TINY, *options.split(), "--lr", "0.1", "--out", "run")
    (run,) = json.loads(Path("run/results.json").read_text())["runs"]
    error = min(run["errors"]) if options == "--keep-best" else run["error_percent"]
    assert f"accuracy {100 - error:.2f} % of 20 images; " in succeeds("evaluate", "run")
    if options.startswith("--ema"):  # few images may not tell the average from the rest
        average = read_checkpoint(Path("run/checkpoint.pt"))["state"]["average"]
        assert torch.equal(open_run(Path("run")).model.fc.weight, average["module.fc.weight"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_an_exported_model_computes_what_the_model_does_for_any_batch(name, photographs):
    images = torch.randn(5, 3, 16, 16)
    if name == "model.onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert "alone" not in succeeds("export", "run", name)
    if name == "model.onnx":
        session = onnxruntime.InferenceSession(name)
        found = torch.tensor(session.run(["logits"], {"images": images.numpy()})[0])
        facts = session.get_modelmeta().custom_metadata_map["fxlocal"]
    else:
        extra = {"fxlocal": ""}
        found = torch.export.load(name, extra_files=extra).module()(images)
        facts = extra["fxlocal"]
    assert torch.allclose(found, photographs.model(images), atol=1e-5)
    assert json.loads(facts)["classes"] == ["cat", "dog"]


# From Python


class Bad:
    plan = None


@pytest.mark.parametrize(
    ("strategies", "told", "message"),
    [
        ("sgd,topk", {}, "'sgd,topk' is one text: give a list of specs, or a dict"),
        ({"sgd": Plan()}, {}, "'sgd' is the name of another strategy: give yours its own"),
        ({"mine": Bad()}, {}, "strategy 'mine': mine makes Bad, no schedule: give what has"),
        ({"mine": lambda epochs: 1 / 0}, {}, "'mine': mine raises ZeroDivisionError"),
        (["sgd", "frozen"], {}, "unknown strategy 'frozen'. Nearest: 'freeze'"),
        (["sgd"], {"model": nn.Linear(3, 4)}, "model=Linear: give a function that builds"),
        (["sgd"], {"model": lambda: 3}, "model=function: give a function that builds"),
        (["sgd"], {"model": lambda: nn.Linear(3, 4), "width": 8}, "width=8: is of a model by name"),
        (["sgd"], {"seeds": [0, 0]}, "give at least one seed, and none twice"),
        (["sgd"], {"out": "taken"}, "taken is not empty; give another --out"),
        (["sgd"], {"data": "digit"}, "unknown data 'digit'. Nearest: 'digits'"),
    ],
)
def test_what_is_wrong_from_python_is_said_before_anything_is_trained(
    strategies, told, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(strategies, **{"model": "resnet8"} | told)
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]


@pytest.mark.slow
def test_from_python_runs_are_the_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specs = ["sgd", "freeze-eval(start=0)", "local-static(start=0)"]
    succeeds("compare", *TINY, "--seeds", "3", "--strategies", ",".join(specs), "--out", "cli")
    theirs = json.loads(Path("cli/results.json").read_text())
    own = {
        "sgd": "sgd",
        "mine": lambda epochs: Static(epochs, start=0, rule=Freeze(), norm="eval"),
        "theirs": Static(2, start=0, rule=Hebbian()),
    }
    data = load_data("fake", num_train=64, num_test=20, size=8)
    told = {"settings": Settings(epochs=2, batch_size=16), "seeds": [3]}
    make = partial(build_model, "resnet8", num_classes=10, width=4)
    results = compare(own, data=data, model=make, **told, out="python")
    assert [run.strategy for run in results.runs] == list(own)
    for mine, run in zip(results.runs, theirs["runs"], strict=True):
        assert (mine.loss, mine.boundary) == (run["loss"], run["boundary"])
    written = json.loads(Path("python/results.json").read_text())
    assert written["prefixes"]["mine"] == "frozen" and Path("python/report.html").exists()
    constant = {"half": Plan(local=LocalPrefix("layer2", Freeze()))}
    (run,) = compare(constant, data=data, model="resnet8", width=4, **told).runs
    assert run.boundary == [3, 3]
