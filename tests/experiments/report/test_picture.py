"""The picture of the blocks: what it shows, by the bars, arcs and lines of the figure."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
import torch
import torchvision
from matplotlib.colors import to_hex

import fxlocal
from fxlocal import Analysis, Block, Cost, Freeze, Hebbian, Layer, Oja, PlanError, SkipEdge
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.report.picture import (
    FILLS,
    draw_blocks,
    find_arcs,
    plot_blocks,
    short,
    write_picture,
)
from fxlocal.experiments.training.settings import SettingsError

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


def named(figure, start, row=None):
    """The patches and lines whose name starts so, of one row or all."""
    panels = figure.axes if row is None else [figure.axes[row]]
    found = [artist for axes in panels for artist in (*axes.patches, *axes.lines)]
    return [artist for artist in found if str(artist.get_gid()).startswith(start)]


def bars(axes):
    """What is drawn of each block: (left, width) of back-propagation and prefix, the outline."""
    return [
        [(bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in container]
        for container in axes.containers
    ]


def fills(axes):
    """The colours of each block, from left to right."""
    below, above, _ = bars(axes)
    found = []
    for (_, width, rest), (_, part, prefix) in zip(below, above, strict=True):
        shown = {prefix: part, rest: width - part}
        found.append([colour for colour, wide in shown.items() if wide > 1e-9])
    return found


def words(figure):
    (legend,) = figure.legends
    panels = [text.get_text() for axes in figure.axes for text in axes.texts]
    title = figure.axes[0].get_title(loc="left")
    return [title, *panels, *(text.get_text() for text in legend.get_texts())]


@pytest.mark.parametrize(
    ("rule", "prefix", "name"),
    [
        (Hebbian(0.5), "local", "local rule (Hebbian, rate 0.5)"),
        (Oja(0.5), "local", "local rule (Oja, rate 0.5)"),
        (Freeze(), "frozen", "frozen"),
        (None, "local", "local rule"),
    ],
)
def test_a_block_shows_how_it_learns(rule, prefix, name):
    figure = plot_blocks(chain([1, 2, 1]), 1, rule)
    (axes,) = figure.axes
    assert fills(axes) == [[FILLS[prefix]], [FILLS["backprop"]], [FILLS["backprop"]]]
    assert name in words(figure)
    assert len(named(figure, "boundary")) == 1


def test_a_split_block_shows_both_colours_in_proportion_to_cost():
    figure = plot_blocks(chain([1, 2, 1], flops=[100, 300, 100, 100]), 2, Hebbian())
    (axes,) = figure.axes
    assert fills(axes)[1] == [FILLS["local"], FILLS["backprop"]]
    below, above, _ = bars(axes)
    assert above[1][1] == pytest.approx(0.75 * below[1][1])
    (cut,) = named(figure, "boundary")
    assert cut.get_xdata()[0] == pytest.approx(above[1][0] + above[1][1])


def test_plain_training_has_one_colour_and_no_boundary():
    figure = plot_blocks(chain([1, 1]), 0)
    assert fills(figure.axes[0]) == [[FILLS["backprop"]]] * 2
    assert not named(figure, "boundary")
    assert "all learn by back-propagation" in words(figure)[0]


def test_height_is_cost():
    def heights(analysis):
        outlines = named(plot_blocks(analysis, 0), "block")
        return [bar.get_height() for bar in outlines]

    assert heights(chain([1, 1, 1], flops=[1000, 500, 1])) == [72, 36, 2]  # never invisible
    assert heights(chain([2, 1, 4])) == [36, 18, 72]


def test_the_boundary_lies_in_the_gap_before_its_block():
    figure = plot_blocks(chain([1, 1, 1]), 1)
    (cut,) = named(figure, "boundary")
    before, after, _ = bars(figure.axes[0])[0]
    assert before[0] + before[1] < cut.get_xdata()[0] < after[0]


def test_skip_edges_arch_over_their_block_or_from_block_to_block():
    analysis = with_skips(
        chain([1, 2, 2, 1]),
        skip("r0", "r2"),  # from the output of block 0, around block 1
        skip("n3", "r3", "gate"),
        skip("r3", "r4", "gate"),
        skip("r0", "r4", "concat", long_range=True),
        skip("x", "r0"),
    )
    ends = [(a.source, a.target, a.kind, len(a.edges)) for a in find_arcs(analysis)]
    inner = [(0, 0, "residual", 1), (1, 1, "residual", 1), (2, 2, "gate", 2)]
    assert ends == [*inner, (0, 2, "concat", 1)]
    figure = plot_blocks(analysis, 0)
    assert len(named(figure, "skip")) == len(named(figure, "arrives")) == 4
    assert "\u00d72" in words(figure)
    (long_range,) = named(figure, "skip-0-2-concat")
    (other,) = named(figure, "skip-1-1")
    assert long_range.get_edgecolor() != other.get_edgecolor()
    assert "r0 -> r4" in long_range.get_label()
    assert {"residual (add)", "gate (mul)", "concat skip (cat), long-range"} <= {*words(figure)}


def test_many_blocks_wrap_and_an_arc_goes_on_in_every_row():
    analysis = with_skips(chain([1] * 70), skip("r0", "r69", "concat", long_range=True))
    figure = plot_blocks(analysis, 30)
    rows = range(len(figure.axes))
    assert [len(named(figure, "block", row)) for row in rows] == [24, 24, 22]
    assert [len(named(figure, "boundary", row)) for row in rows] == [0, 1, 0]
    assert [len(named(figure, "skip", row)) for row in rows] == [1, 1, 1]
    assert len(named(figure, "arrives")) == 1
    colours = [FILLS[how] for how in ("local", "backprop", "backprop")]
    assert [fills(axes)[-1] for axes in figure.axes] == [[colour] for colour in colours]


def test_nested_arcs_do_not_touch():
    analysis = with_skips(
        chain([1] * 6), *(skip(f"r{i}", f"r{5 - i}", "concat", True) for i in range(2))
    )
    figure = plot_blocks(analysis, 0)
    (outer,), (inner,) = named(figure, "skip-0-5"), named(figure, "skip-1-4")
    assert inner.get_path().get_extents().y1 + 5 < outer.get_path().get_extents().y1


def test_names_are_escaped_and_long_ones_keep_their_end():
    def texts(svg):
        return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]

    svg = draw_blocks(chain([1], name="<a & $b$>"), 0)
    assert "<a & $b$>" in texts(svg)
    svg = draw_blocks(chain([1], name="encoder.layers.encoder_layer_11.mlp"), 0)
    assert "\u2026encoder_layer_11.mlp" in texts(svg)
    assert "encoder.layers.encoder_layer_11.mlp" in svg  # whole in the tooltip


def test_tooltips_list_layers_and_costs():
    analysis = with_skips(chain([2], flops=[10**6, 2 * 10**6]), skip("n0", "r1"))
    root = ET.fromstring(draw_blocks(analysis, 0))
    titles = {e.get("id"): e.findtext(f"{SVG}title") for e in root.iter() if e.get("id")}
    assert titles["block-0"].splitlines() == [
        "b0: layers 0 to 1",
        "path0",
        "path1",
        "2,000 parameters; 3.00M FLOPs forward; 2.00 MiB kept for backward",
    ]
    assert titles["skip-0-0-residual"].splitlines() == ["residual (add)", "n0 -> r1"]


def test_header_tells_what_is_saved_for_backward():
    found = words(plot_blocks(chain([1, 1, 1], flops=[1, 1, 1]), 1))
    assert any("Kept for backward: 2.0 of 3.0 MiB" in text for text in found)


def test_refuses_a_model_without_layers_and_an_unknown_file(tmp_path):
    with pytest.raises(PlanError, match="nothing to draw"):
        draw_blocks(Analysis((), (), ()), 0)
    with pytest.raises(SettingsError, match=r"x\.pdf: give a file that ends in \.svg or \.png"):
        write_picture(chain([1]), 0, None, tmp_path / "x.pdf")


def test_the_suffix_says_what_is_written(tmp_path):
    for suffix in ("svg", "png"):
        write_picture(chain([1, 2]), 1, Hebbian(), tmp_path / f"x.{suffix}")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ET.parse(tmp_path / "x.svg").getroot().tag == f"{SVG}svg"
    assert "http" not in (tmp_path / "x.svg").read_text().replace("http://www.w3.org/", "")


def test_short():
    numbers = (0, 999, 1000, 46_200, 999_960, 2e12)
    assert [*map(short, numbers)] == ["0", "999", "1.00k", "46.2k", "1.00M", "2.00T"]


def test_resnet18():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    analysis = fxlocal.analyze(model)
    boundary = analysis.boundary("layer2.0.conv2")
    svg = draw_blocks(analysis, boundary, Hebbian())
    assert svg == draw_blocks(analysis, boundary, Hebbian())
    figure = plot_blocks(analysis, boundary, Hebbian())
    assert len(named(figure, "block")) == 10
    assert len(named(figure, "skip")) == 8
    assert [len(colours) for colours in fills(figure.axes[0])].count(2) == 1
    names = {text.get_text() for text in figure.axes[0].get_xticklabels()}
    assert {"conv1", "layer1.0", "layer4.1", "fc"} <= names


def test_unet():
    model = build_model("unet", num_classes=2, width=4)
    figure = plot_blocks(fxlocal.analyze(model, torch.zeros(1, 3, 32, 32)), 5, Freeze())
    assert len(named(figure, "skip")) == 4
    assert all("concat" in arc.get_gid() for arc in named(figure, "skip"))
    assert "concat skip (cat), long-range" in words(figure)


def test_blocks_that_attend_have_a_mark():
    chained = chain([1, 2, 1])
    analysis = Analysis(chained.layers, (), chained.blocks, None, chained.order, attentions=("r1",))
    figure = plot_blocks(analysis, 0)
    assert [mark.get_gid() for mark in named(figure, "attends")] == ["attends-1"]
    assert "attention" in words(figure) and "attention" not in words(plot_blocks(chained, 0))
    assert "attends 1 time" in draw_blocks(analysis, 0)


def test_the_product_of_q_k_and_v_is_drawn_and_stands_free_in_a_low_block():
    chained = chain([1, 1, 1], flops=[1000, 1, 1])
    names = {"attentions": ("r0", "r1", "r1")}
    analysis = Analysis(chained.layers, (), chained.blocks, chained.costs, chained.order, **names)
    figure = plot_blocks(analysis, 0)
    for block in (0, 1):
        (weights,), (value,) = (
            named(figure, f"product-{block}-qk"),
            named(figure, f"product-{block}-v"),
        )
        (q, *_), (at, *_), (k, *_) = zip(*weights.get_data(), strict=True)
        assert block - 0.38 < q < at < k == block and value.get_xydata()[0, 0] == at
        (mark,) = named(figure, f"attends-{block}")
        assert mark.get_xydata()[0].tolist() == value.get_xydata()[1].tolist()
        letters = [text for text in figure.axes[0].texts if text.get_text() in ("Q", "K", "V")]
        here = sorted(
            t.get_position()[0] for t in letters if abs(t.get_position()[0] - block) < 0.5
        )
        assert here == pytest.approx([q, k, value.get_xydata()[2, 0]])
    (twice,) = [text for text in figure.axes[0].texts if text.get_text() == "\u00d72"]
    assert 0.6 < twice.get_position()[0] < 1.5
    numbers = {text.get_text(): text.xy[1] for text in figure.axes[0].texts if hasattr(text, "xy")}
    assert numbers["1.00k"] == 72 and mark.get_ydata()[0] < 34
    labels = [text.xy for text in figure.axes[0].texts if text.get_text() == "1"]
    assert labels == [(1, 34), (2, 2)]  # over the product; on the bar
