"""The picture of the blocks: what it shows, by the classes that its SVG elements carry."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
import torch
import torchvision

import fxlocal
from fxlocal import Analysis, Block, Cost, Freeze, Hebbian, Layer, PlanError, SkipEdge
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.draw import FILLS, draw_blocks
from fxlocal.experiments.report.layout import find_arcs, find_layout, short

SVG = "{http://www.w3.org/2000/svg}"


def chain(sizes: Sequence[int], flops: Sequence[int] = (), name: str = "b{}") -> Analysis:
    """Blocks of so many layers each; layer i is node ``n<i>``, followed by node ``r<i>``."""
    count = sum(sizes)
    layers = tuple(
        Layer(i, f"path{i}", "conv", f"n{i}", f"path{i}.weight", f"r{i - 1}") for i in range(count)
    )
    blocks, first = [], 0
    for number, size in enumerate(sizes):
        blocks.append(Block(name.format(number), tuple(range(first, first + size)), f"n{first}"))
        first += size
    costs = tuple(Cost(f, 2**20, 1000) for f in flops) if flops else None
    nodes = ["x", *(f"{kind}{i}" for i in range(count) for kind in "nr")]
    return Analysis(layers, (), tuple(blocks), costs, {node: i for i, node in enumerate(nodes)})


def with_skips(analysis: Analysis, *skips: SkipEdge) -> Analysis:
    return Analysis(analysis.layers, skips, analysis.blocks, analysis.costs, analysis.order)


def skip(source: str, target: str, kind: str = "residual", long_range: bool = False) -> SkipEdge:
    return SkipEdge(source, target, kind, long_range, source)  # type: ignore[arg-type]


def drawn(svg: str, css_class: str) -> list[ET.Element]:
    """The elements that carry a class."""
    root = ET.fromstring(svg)
    return [e for e in root.iter() if css_class in e.get("class", "").split()]


def fills(block: ET.Element) -> list[str]:
    """The colours of a block, from left to right."""
    parts = [e for e in block.iter(f"{SVG}rect") if e.get("class") != "outline"]
    return [part.get("fill", "") for part in sorted(parts, key=lambda p: float(p.get("x", "")))]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(("rule", "prefix"), [(Hebbian(0.5), "local"), (Freeze(), "frozen")])
def test_a_block_shows_how_it_learns(rule: Hebbian | Freeze, prefix: str) -> None:
    svg = draw_blocks(chain([1, 2, 1]), 1, rule)
    assert [fills(b) for b in drawn(svg, "block")] == [
        [FILLS[prefix]],
        [FILLS["backprop"]],
        [FILLS["backprop"]],
    ]
    words = " ".join(texts(svg))
    assert ("Hebbian, rate 0.5" in words) == (prefix == "local")
    assert ("frozen" in words) == (prefix == "frozen")
    assert len(drawn(svg, "boundary")) == 1


def test_a_split_block_shows_both_colours_in_proportion_to_cost() -> None:
    svg = draw_blocks(chain([1, 2, 1], flops=[100, 300, 100, 100]), 2, Hebbian())
    (split,) = drawn(svg, "split")
    assert fills(split) == [FILLS["local"], FILLS["backprop"]]
    left, right = (float(part.get("width", "")) for part in split.findall(f"{SVG}rect")[:2])
    assert left == pytest.approx(3 * right, abs=0.2)


def test_plain_training_has_one_colour_and_no_boundary() -> None:
    svg = draw_blocks(chain([1, 1]), 0)
    assert {colour for block in drawn(svg, "block") for colour in fills(block)} == {
        FILLS["backprop"]
    }
    assert not drawn(svg, "boundary")
    assert "all learn by back-propagation" in svg


def test_height_is_cost() -> None:
    def heights(analysis: Analysis) -> list[float]:
        outlines = drawn(draw_blocks(analysis, 0), "outline")
        return [float(e.get("height", "")) for e in outlines]

    assert heights(chain([1, 1, 1], flops=[1000, 500, 1])) == [96, 48, 3]  # never invisible
    assert heights(chain([2, 1, 4])) == [48, 24, 96]


def test_the_boundary_lies_in_the_gap_before_its_block() -> None:
    layout = find_layout(chain([1, 1, 1]), 1)
    before, after, _ = layout.boxes
    assert layout.cut is not None
    assert before.x + before.width < layout.cut[1] < after.x


def test_skip_edges_arch_over_their_block_or_from_block_to_block() -> None:
    analysis = with_skips(
        chain([1, 2, 2, 1]),
        skip("r0", "r2"),  # from the output of block 0, around block 1
        skip("n3", "r3", "gate"),
        skip("r3", "r4", "gate"),
        skip("r0", "r4", "concat", long_range=True),
        skip("x", "r0"),
    )
    ends = [(a.source, a.target, a.kind, len(a.edges)) for a in find_arcs(analysis)]
    assert ends == [
        (0, 0, "residual", 1),
        (1, 1, "residual", 1),
        (2, 2, "gate", 2),
        (0, 2, "concat", 1),
    ]
    svg = draw_blocks(analysis, 0)
    assert len(drawn(svg, "skip")) == 4
    assert "\u00d72" in texts(svg)
    (long_range,) = drawn(svg, "long-range")
    (other, *_) = drawn(svg, "residual")
    assert long_range.find(f"{SVG}path").get("stroke") != other.find(f"{SVG}path").get("stroke")  # type: ignore[union-attr]
    assert "r0 -> r4" in (long_range.findtext(f"{SVG}title") or "")


def test_many_blocks_wrap_and_an_arc_goes_on_in_every_row() -> None:
    analysis = with_skips(chain([1] * 70), skip("r0", "r69", "concat", long_range=True))
    layout = find_layout(analysis, 30)
    assert [sum(box.row == row for box in layout.boxes) for row in range(layout.rows)] == [
        24,
        24,
        22,
    ]
    assert layout.cut is not None and layout.cut[0] == 1
    svg = draw_blocks(analysis, 30)
    rows = drawn(svg, "row")
    tops = [float((row.get("transform") or "").split()[1].rstrip(")")) for row in rows]
    assert tops == sorted(tops)
    assert [sum("skip" in e.get("class", "") for e in row) for row in rows] == [1, 1, 1]
    assert len(drawn(svg, "head")) == 1  # only where it arrives


def test_nested_arcs_do_not_touch() -> None:
    analysis = with_skips(
        chain([1] * 6), *(skip(f"r{i}", f"r{5 - i}", "concat", True) for i in range(2))
    )
    inner, outer = find_layout(analysis, 0).stretches
    assert (inner.arc.source, outer.arc.source) == (1, 0)
    assert outer.height > inner.height


def test_names_are_escaped_and_long_ones_keep_their_end() -> None:
    svg = draw_blocks(chain([1], name="<a & b>"), 0)
    assert "<a & b>" in texts(svg)
    svg = draw_blocks(chain([1], name="encoder.layers.encoder_layer_11.mlp"), 0)
    assert "\u2026encoder_layer_11.mlp" in texts(svg)
    assert "encoder.layers.encoder_layer_11.mlp" in svg  # whole in the tooltip


def test_tooltip_lists_layers_and_costs() -> None:
    (block,) = drawn(draw_blocks(chain([2], flops=[10**6, 2 * 10**6]), 0), "block")
    assert (block.findtext(f"{SVG}title") or "").splitlines() == [
        "b0: layers 0 to 1",
        "path0",
        "path1",
        "2,000 parameters; 3.00M FLOPs forward; 2.00 MiB saved for backward",
    ]


def test_header_tells_what_is_saved_for_backward() -> None:
    svg = draw_blocks(chain([1, 1, 1], flops=[1, 1, 1]), 1)
    assert any("Saved for backward: 2.0 of 3.0 MiB" in text for text in texts(svg))


def test_refuses_a_model_without_layers() -> None:
    with pytest.raises(PlanError, match="nothing to draw"):
        draw_blocks(Analysis((), (), ()), 0)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (46_200, "46.2k"),
        (999_960, "1.00M"),
        (2e12, "2.00T"),
    ],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


def test_resnet18() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    analysis = fxlocal.analyze(model)
    boundary = analysis.boundary("layer2.0.conv2")
    svg = draw_blocks(analysis, boundary, Hebbian())
    assert svg == draw_blocks(analysis, boundary, Hebbian())
    assert len(drawn(svg, "block")) == 10
    assert len(drawn(svg, "skip")) == 8
    assert len(drawn(svg, "split")) == 1
    assert {"conv1", "layer1.0", "layer4.1", "fc"} <= set(texts(svg))


def test_unet() -> None:
    model = build_model("unet", num_classes=2, width=4)
    svg = draw_blocks(fxlocal.analyze(model, torch.zeros(1, 3, 32, 32)), 5, Freeze())
    arcs = drawn(svg, "long-range")
    assert [arc.get("class") for arc in arcs] == ["skip concat long-range"] * 4
    assert "concat skip (cat), long-range" in texts(svg)
