"""Fine-tuning by the command line: what a run says at its start, and what is wrong, in a line."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from support.shell import TINY, fails, fxlocal, succeeds

from fxlocal.experiments.models.catalogue import build_model

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
MINE = """
from fxlocal import Plan
from fxlocal.schedules import Static
from torch import nn
def raises(): raise ValueError("not today")
def number(): return 3
def late(epochs, *, start: float = 0.5): return Static(epochs=epochs, start=start)
def pair(num_classes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, num_classes)
        def forward(self, x):
            y = self.fc(x.flatten(1))
            return y, y
    return Net()
value = 3
"""
FAKE = ("--data", "fake", "--num-train", "64", "--num-test", "20", "--size", "8")
SMALL = ("--size", "16", "--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "4")

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Photographs, a file of the user's, and weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        for i in range(6):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (40 * i, 7, 100)).save(path)
    (tmp_path / "photos" / "readme.txt").write_text("")
    (tmp_path / "mine_of_cli.py").write_text(MINE)
    torch.save(build_model("resnet8", num_classes=7, width=4).state_dict(), "seven.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "taken").write_text("a file")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def test_a_run_says_first_what_goes_into_it(tmp_path):
    told = ("--weights", "seven.pt", "--freeze", "conv1", "--strategy", "sgd", "--out", "run")
    text = succeeds(
        "train", "--data", "folder:photos", *SMALL, *told, "--split", "0.25", "--workers", "0"
    )
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    data, note, model, weights, out, *_ = lines[first:]
    assert data == (
        "data: folder:photos, 9 images to train and 3 to test, 3x16x16, 2 classes (cat, dog)"
    )
    assert note == "note: photos: 1 other files are ignored (1 .txt)"
    assert re.fullmatch(
        r"model: resnet8, 10 layers, \d,\d{3} parameters, 108 of them frozen; on cpu .*", model
    )
    assert weights == (
        "weights: 54 of 56 tensors from seven.pt; 2 of another shape there (fc.weight, fc.bias)"
    )
    assert out == "out: run" and not (tmp_path / "run" / "best.pt").exists()


def test_the_best_weights_are_kept_and_a_run_ends_that_gets_no_better(tmp_path):
    told = ("--lr", "0", "--keep-best", "--patience", "1", "--strategy", "sgd", "--out", "run")
    text = succeeds("train", *TINY, "--epochs", "9", *told)
    assert re.search(r"^error .*, best \d+\.\d\d % in epoch \d, best.pt; run$", text, re.MULTILINE)
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["runs"][0]["loss"]) < 9
    start = build_model("resnet8", num_classes=10, width=4, seed=0).state_dict()
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert all(torch.equal(best[name], start[name]) for name in start if "weight" in name)


def test_a_network_for_small_images_says_so_of_large_ones():
    told = ("--data", "fake", "--num-train", "8", "--num-test", "2", "--size", "64")
    told += ("--model", "resnet18", "--width", "1", "--epochs", "1", "--batch-size", "4")
    text = succeeds("train", *told, "--strategy", "sgd", "--out", "run")
    assert "note: resnet18 is the variant for images of 32 pixels, slow and weak at 64: " in text
    assert "take --model torchvision:resnet18, or --size 32" in text


def test_rare_options_stand_on_the_page_of_help_all():
    short, long = succeeds("train", "--help"), succeeds("train", "--help-all")
    for option in ("--weights", "--freeze", "--augment", "--split"):
        assert option in short and option in long
    for option in ("--lr-of", "--output", "--ema", "--patience", "--workers", "--skip-damaged"):
        assert option not in short and option in long
    assert "Fine-tuning and regularisation" in short


WRONG = {
    "--data photos": "'photos' is a folder: give folder:photos",
    "--data folder:nowhere": "No such file",
    "--data folder:photos/cat": "class folder",
    "--data folder:photos --split 1": "split of 'folder:photos' must be between 0 and 1",
    "--split 0.2": "split=0.2 does not apply to 'fake'",
    "--skip-damaged": "skip_damaged=True does not apply to 'fake'",
    "--data mine_of_cli:raises": "raises ValueError: not today",
    "--data mine_of_cli:number": "returned int: give (train, test)",
    "--data mine_of_cli:value": "is a int, not a function",
    "--data mine_of_cli:nothing": "has no 'nothing'",
    "--data nowhere:thing": "cannot import 'nowhere'",
    "--workers 2": "--workers: the images of fake are in memory",
    "--workers -1": "workers=-1: must be at least 0",
    "--model mine_of_cli:pair": "returned a tuple of 2, from '0' on",
    "--model mine_of_cli:pair --output 5": "no tensor '5' in it",
    "--model mine_of_cli:pair --output x": "no tensor 'x' in it",
    "--model timm:no_such_model": "timm",
    "--weights nowhere.pt": "--weights nowhere.pt: there is no such file",
    "--weights photos": "--weights photos: there is no such file",
    "--weights text.pt": "neither safetensors nor a whole state dict",
    "--weights seven.pt --model vgg13": "nothing in it fits the model by name: it has conv1.weight",
    "--weights torchvision:nope": "--weights torchvision:nope: ",
    "--freeze conv9": "--freeze: the model has no parameters in 'conv9'. Nearest: 'conv1'",
    "--freeze conv1,bn1,layer1,layer2,layer3,fc": "no parameter is left to learn",
    "--freeze conv1,": "--freeze 'conv1,': give paths",
    "--lr-of fcc=1": "--lr-of: the model has no parameters in 'fcc'. Nearest: 'fc'",
    "--lr-of fc": "--lr-of 'fc': give PATH=RATE",
    "--augment mixup+cutmix": "give one of mixup and cutmix",
    "--augment rotate": "unknown augmentation 'rotate'",
    "--augment randaugment": "nothing says which values of fake are black and white",
    "--label-smoothing 1": "label_smoothing=1.0: give 0, or less than 1",
    "--clip 0": "clip=0.0: must be finite, above 0",
    "--ema 1.5": "ema=1.5: give a decay",
    "--ema 0.9 --strategy prune-train": "--ema: there is no average of weights that are cut",
    "--accumulate 3": "a batch of 16 images has no so many equal parts",
    "--accumulate 2 --strategy greedy": "--accumulate: local modules learn inside the forward",
    "--accumulate 2 --grow-batch": "--accumulate: a batch that grows fills the memory",
    "--accumulate 2 --nproc 2": "nproc=2: processes share a batch out; leave out --accumulate",
    "--clip 1 --nproc 2 --strategy greedy": "no process has all local modules, as --clip asks",
    "--patience 0": "patience=0: must be at least 1",
    "--strategy mine_of_cli:late(stat=1)": "has no argument 'stat'. Nearest: 'start'",
    "--strategy mine_of_cli:late(start=x)": "mine_of_cli:late: start=x is not a number",
    "--strategy mine_of_cli:late(start=2)": "start=2",
    "--strategy mine_of_cli:raises": "raises ValueError: not today",
    "--strategy mine_of_cli:number": "makes int, no schedule",
    "--strategy mine_of_cli:none": "has no 'none'",
    "--strategy local-static(rule=mine_of_cli:value)": "Custom(delta=3)",
    "--strategy local-static(rule=hebb)": "rule=hebb is not one of hebbian, oja or package.module",
    "--strategy timm:resnet18": "'timm:resnet18' is a model",
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("options", WRONG)
def test_wrong_input_is_one_line_and_leaves_all_files_as_they_were(options, tmp_path):
    before = files(tmp_path)
    told = () if "--data" in options else FAKE
    told += () if "--model" in options else ("--model", "resnet8", "--width", "4")
    told += ("--epochs", "2", "--batch-size", "16", "--out", "run")
    line = fails("train", *told, *shlex.split(options))
    assert WRONG[options] in line
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare --keep-best", "--keep-best: this keeps no weights; fxlocal train does"),
        (
            "compare --weights seven.pt --strategies sgd,vgg13",
            "--weights: is of resnet8; leave vgg",
        ),
        ("compare --strategies sgd,mine_of_cli:late(x=1)", "has no argument 'x'"),
        ("sweep --strategy freeze --vary lr=0.1,-1", "lr=-1.0: must be finite"),
        ("sweep --strategy freeze --vary ema=0.5,2.0", "ema=2.0: give a decay"),
    ],
)
def test_so_it_is_of_several_runs(command, message, tmp_path):
    before = files(tmp_path)
    verb, *options = shlex.split(command)
    assert message in fails(verb, *TINY, *options, "--out", "run")
    assert files(tmp_path) == before


def commands() -> list[str]:
    return re.findall(r"(?:^|`)fxlocal ((?:train|compare|sweep) [^`\n]*)", PAGE.read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in commands() if not {"timm:resnet18", "--resume"} & {*c.split()}]
)
def test_the_commands_of_the_page_run(command, tmp_path, monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    best = tmp_path / "runs" / "photos" / "best.pt"
    best.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), best)
    verb, *options = shlex.split(command)
    small = ["--size", "32", "--epochs", "1", "--batch-size", "8", "--out", "run", "--workers", "0"]
    small += ["--lr-schedule", "constant"] if "warmup" in command else []
    small += ["--seeds", "0"] if verb != "train" else []
    small += ["--model", "resnet8"] if verb == "sweep" else []
    assert fxlocal(verb, *options, *small).exit_code == 0
    assert len(commands()) == 8
