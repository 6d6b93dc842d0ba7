"""A place where almost everything is wrong, and commands in it: `wrong_inputs.txt` lists them."""

import hashlib
import io
import json
import shlex
import shutil
from pathlib import Path

import torch
from PIL import Image

from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training import checkpoint

from .shell import FAKE, TINY, fxlocal, succeeds

SETTINGS = {
    "--data": FAKE,
    "--model": ["--model", "resnet8", "--width", "4"],
    "--epochs": ["--epochs", "2"],
    "--batch-size": ["--batch-size", "16"],
    "--out": ["--out", "new"],
}
RUNS = ("run", "seen", "compared", "swept")  # folders of runs, and of what is made of them:
MADE = ("checkpoint_", "job_", "best_", "seen_", "results_", "sweep_", "untrained", "runs_")


def read_table():
    """Return the commands with what is said of each, and whether the run had begun by then.

    Variables, ``NAME=VALUE``, may stand before a command.
    """
    text = (Path(__file__).parent / "wrong_inputs.txt").read_text()
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    pairs = [line.split("  =>", 1) for line in lines]
    return {c.strip(): (m.lstrip("> "), m.startswith(">")) for c, m in pairs}


def needs_runs(command):
    """Tell whether the command is about a run that there has to be."""
    words = [word.partition("/")[0] for word in command.split()[1:]]
    return any(word in RUNS or word.startswith(MADE) for word in words)


def drive(command, environment):
    """Run a command in the current folder; small settings stand for those that it leaves out."""
    words = shlex.split(command)
    while "=" in words[0]:
        environment.setenv(*words.pop(0).split("=", 1))
    if words[0] in ("train", "compare", "sweep") and "--resume" not in words:
        given = [words[0]]
        for option, usual in SETTINGS.items():
            given += [] if option in words else usual
        words = given + words[1:]
    return fxlocal(*words)


def contents(root):
    """Return all files below a folder."""
    found = (path for path in root.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def build_place():
    """Put images, weights and a module of the user's into the current folder."""
    for folder, names in {
        "photos": "cat dog",
        "splits/train": "cat dog",
        "splits/val": "cat dog",
        "valonly/val": "cat dog",
        "differ/train": "cat dog",
        "differ/val": "cat cow",
        "one": "cat",
        "nocow": "cat dog",
        "damaged": "cat dog",
        "unreadable": "cat dog",
        "cut": "cat dog",
    }.items():
        for name in names.split():
            Path(folder, name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 16), (40 * i, 7, 100)).save(Path(folder, name, f"{i}.png"))
    Path("nocow/cow").mkdir()
    Path("damaged/cat/1.png").write_text("no image")
    Path("cut/dog/0.png").write_bytes(Path("photos/dog/0.png").read_bytes()[:40])
    for path in Path("unreadable").rglob("*.png"):
        path.write_text("no image")
    for name in ("nothing", "folder.pt"):
        Path(name).mkdir()
    Path("taken").write_text("a file")
    Path("loop").symlink_to("loop")
    shutil.copy(Path(__file__).parent / "wrong_mine.py", "wrong_mine.py")
    model = build_model("resnet8", num_classes=7, width=4, seed=0)
    state = model.state_dict()
    for name, content in {
        "seven": state,
        "list": [1, 2],
        "dict": {"a": 1},
        "model": model,
        "tensor": torch.zeros(2),
        "texts": {name: "x" for name in state},
    }.items():
        torch.save(content, f"{name}.pt")
    Path("half.pt").write_bytes(Path("seven.pt").read_bytes()[:2000])
    for name, content in {
        "text.pt": b"hello",
        "empty.pt": b"",
        "bad.safetensors": b"\xff" * 40,
    }.items():
        Path(name).write_bytes(content)


def build_runs():
    """Make a run of each verb, and copies of them that are wrong in one thing each."""
    succeeds("train", *TINY, "--out", "run")
    succeeds("compare", *TINY, "--strategies", "sgd,freeze", "--seeds", "0", "--out", "compared")
    vary = ("--vary", "largest=0.4,0.6", "--seeds", "0")
    succeeds("sweep", *TINY, "--strategy", "freeze", *vary, "--out", "swept")
    photos = ("--data", "folder:photos", "--size", "16", "--workers", "0", "--strategy", "sgd")
    small = ("--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "4")
    succeeds("train", *photos, *small, "--out", "seen")
    _spoil_checkpoints()
    _spoil_jobs()
    _spoil_best()
    _spoil_results()


def _copy(run, name, file, content):
    shutil.copytree(run, name)
    path = Path(name, file)
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _sealed(packed, **changes):
    """Return a checkpoint with other parts, under a checksum that fits; without those of None."""
    content = torch.load(io.BytesIO(packed.rpartition(checkpoint._MARK)[0]), weights_only=True)
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner.update({last: value}) if value is not None else inner.pop(last)
    made = io.BytesIO()
    torch.save(content, made)
    seal = hashlib.sha256(made.getvalue()).hexdigest().encode()
    return made.getvalue() + checkpoint._MARK + seal + b"\n"


def _spoil_checkpoints():
    good = Path("run/checkpoint.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for name, content in {
        "empty": b"",
        "half": good[: len(good) // 2],
        "text": b"hello",
        "foreign": Path("seven.pt").read_bytes(),
        "flipped": bytes(flipped),
        "longer": good + b"x",
        "older": _sealed(good, format=1),
        "newer": _sealed(good, format=99),
        "stateless": _sealed(good, state=None),
        "list": _sealed(good, state=[1]),
        "prints": _sealed(good, fingerprint=3),
        "versions": _sealed(good, versions=3, format=1),
        "driver": _sealed(good, state__driver=None),
        "number": _sealed(good, state__driver=3),
        "runless": _sealed(good, state__run=None),
        "rates": _sealed(good, state__scheduler=None),
        "fields": _sealed(good, state__run__colour=3),
        "weight": _sealed(good, state__driver__model={"fc.weight": torch.zeros(2, 2)}),
        "folder": None,
    }.items():
        _copy("run", f"checkpoint_{name}", "checkpoint.pt", content)


def _spoil_jobs():
    job = json.loads(Path("run/job.json").read_text())
    seen = json.loads(Path("seen/job.json").read_text())
    options = job["options"]
    for name, content in {
        "empty": b"",
        "half": json.dumps(job).encode()[:200],
        "binary": b"\xff\xfe\x00",
        "list": [1],
        "verbless": {"options": {}},
        "optionless": {"verb": "train"},
        "options": {"verb": "train", "options": [1]},
        "dance": {**job, "verb": "dance"},
        "epochs": {**job, "options": {**options, "epochs": "many"}},
        "rate": {**job, "options": {**options, "lr": [1, 2]}},
        "nan": {**job, "options": {**options, "lr": float("nan")}},
        "model": {**job, "options": {**options, "model": 3}},
        "data": {**job, "data": 3},
        "facts": {**job, "data": {"name": "x"}},
        "folder": None,
    }.items():
        _copy("run", f"job_{name}", "job.json", content)
    for name, facts in {"shape": [3], "statistics": 3, "num_classes": "x"}.items():
        content = {**seen, "data": {**seen["data"], name: facts}}
        _copy("seen", f"seen_{name}", "job.json", content)
    for name, option in {"width": 8, "device": "cuda:99"}.items():
        content = {**seen, "options": {**seen["options"], name: option}}
        _copy("seen", f"seen_{name}", "job.json", content)


def _spoil_best():
    for name in ("text", "empty", "list", "model", "texts", "half", "seven"):
        _copy("seen", f"best_{name}", "best.pt", Path(f"{name}.pt").read_bytes())
    shutil.copytree("seen", "untrained")
    Path("untrained/checkpoint.pt").unlink()


def _spoil_results():
    good = json.loads(Path("compared/results.json").read_text())
    for name, content in {
        "empty": b"",
        "half": json.dumps(good).encode()[:500],
        "binary": b"\xff\x00",
        "list": [1],
        "number": 3,
        "runless": {name: value for name, value in good.items() if name != "runs"},
        "runs": {**good, "runs": 3},
        "bare": {**good, "runs": [{}]},
        "summary": {**good, "summary": 3},
        "short": {**good, "runs": [{**run, "loss": []} for run in good["runs"]]},
        "epochs": {**good, "epochs": "x"},
        "other": {**good, "runs": [{**run, "strategy": "z"} for run in good["runs"]]},
        "machine": {name: value for name, value in good.items() if name != "device"},
        "numbers": {**good, "runs": [{**run, "loss": [9.0, 9.0]} for run in good["runs"]]},
        "folder": None,
    }.items():
        _copy("compared", f"results_{name}", "results.json", content)
    _copy("compared", "results_picture", "blocks.svg", b"\xff\x00\xfe")
    _copy("compared", "runs_checkpoint", "checkpoint.pt", b"hello")
    _copy("compared", "runs_log", "runs.jsonl", None)
    sweep = json.loads(Path("swept/sweep.json").read_text())
    bare = [{n: v for n, v in row.items() if n != "setting"} for row in sweep["summary"]]
    _copy("swept", "sweep_vary", "sweep.json", {**sweep, "vary": 3})
    _copy("swept", "sweep_settings", "sweep.json", {**sweep, "summary": bare})
