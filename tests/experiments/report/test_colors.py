"""The page's colours: seen on its paper, light and dark, and told apart by the colour-blind."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fxlocal.experiments.report import page

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopes": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopes": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
STYLE = (Path(page.__file__).parent / "report.css").read_text()
LIGHT, DARK, *_ = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in re.split("@media", STYLE))


def linear(color):
    text = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    value = np.array([*bytes.fromhex(text)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(TO_XYZ[1] @ linear(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ rgb, 0) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("style", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_words_are_seen_on_the_paper(style):
    lines = [style[f"c{i}"] for i in range(6)]
    assert min(contrast(color, style["paper"]) for color in lines) >= 3  # WCAG 1.4.11
    words = [style[name] for name in ("ink", "faint", "bad")]
    assert min(contrast(color, style["paper"]) for color in words) >= 4.5  # WCAG 1.4.3


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize("style", [LIGHT, DARK], ids=["light", "dark"])
def test_no_two_colours_look_alike(style, eyes):
    seen = [lab(SEEN_BY[eyes] @ linear(style[f"c{i}"])) for i in range(6)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 14  # 2 is just noticeable
