"""The figures of docs/monitoring.md: how they are drawn, their size, and that they are labelled as what they are."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from deploy.monitoring.panels import ROWS, Kind, Panel
from docs.tools.monitoring_figures import COLOURS, FIGURES, NOT_GRAFANA, Plot, Timeline, axis_unit, draw, draw_plot, legend

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
SIZE_MAX = 150_000
SVG = "{http://www.w3.org/2000/svg}"
TIMELINE = Timeline(100.0, 109.0, ((104.0, "leader <killed>"),))
NAN = math.nan


def plot(kind: Kind, *, unit: str = "short", red: float | None = None, **series: Sequence[float]) -> Plot:
    return Plot(Panel(kind, "one", unit, "", (), red_from=red), series, 1.0)


def drawn(kind: Kind, *, red: float | None = None, **series: Sequence[float]) -> Axes:
    axes = Figure().add_subplot()
    draw_plot(axes, plot(kind, red=red, **series), TIMELINE)
    return axes


def steps(axes: Axes) -> list[StepPatch]:
    return [patch for patch in axes.patches if isinstance(patch, StepPatch)]


def boxes(patch: StepPatch) -> list[tuple[float, float, float, float]]:
    """Return (from, to, bottom, top) of each step that is drawn."""
    values, edges, baseline = patch.get_data()
    bottoms = np.broadcast_to(baseline, values.shape)
    rows = zip(edges, edges[1:], bottoms, values, strict=False)
    return [(float(a), float(b), float(low), float(high)) for a, b, low, high in rows if high > low]


def texts(picture: ElementTree.Element) -> list[str]:
    return [(text.text or "") for text in picture.iter(f"{SVG}text")]


def limits(axes: Axes) -> list[float]:
    """Return the positions of the red lines."""
    return [float(line.get_ydata()[0]) for line in axes.lines if to_hex(line.get_color()) == "#cc0000"]


def test_a_gap_is_a_gap() -> None:
    """The line is broken where values are missing, and an isolated value is a dot."""
    axes = drawn("lines", a=[1, 2, NAN, NAN, 3, NAN, NAN, 1, 1])
    (line,) = [line for line in axes.lines if line.get_label() == "a"]
    np.testing.assert_array_equal(line.get_ydata(), [1, 2, NAN, NAN, 3, NAN, NAN, 1, 1])
    assert line.get_markevery() == [4]
    assert line.get_marker() == "."


def test_a_stack_is_on_top_of_what_is_below() -> None:
    """The second series starts at the top of the first one, values hold until the next one, and missing ones are not drawn."""
    first, second = steps(drawn("stack", a=[2, 2, 2, NAN, NAN, 2], b=[NAN, 1, NAN, NAN, NAN, NAN]))
    assert boxes(first) == [(0, 1, 0, 2), (1, 2, 0, 2), (2, 3, 0, 2), (5, 6, 0, 2)]
    assert boxes(second) == [(1, 2, 2, 3)]


def test_a_bar_ends_at_its_time() -> None:
    """An increase happened in the step that ends at its time."""
    axes = drawn("bars", a=[NAN, NAN, NAN, 0, 1])
    assert boxes(steps(axes)[0]) == [(3, 4, 0, 1)]
    (mark,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(mark.get_xdata()) == [4, 4]


def test_text_is_text() -> None:
    """Names, titles and events are escaped text elements; events are numbered and listed below the plots."""
    picture = ElementTree.fromstring(draw("A & B", ["caption"], [plot("lines", **{"<x>": [1.0, 1.0]})], TIMELINE))
    assert {"A & B", "one", "<x>", "1", "Events: 1: leader <killed>, 4 s", "caption"} <= set(texts(picture))


def test_the_same_data_give_the_same_file() -> None:
    """No date, no version and no random id is in a figure."""
    one, two = (draw("A", [], [plot("stack", a=[1, NAN, 2])], TIMELINE) for _ in range(2))
    assert one == two
    assert "<dc:date>" not in one
    assert "<dc:creator>" not in one


@pytest.mark.parametrize(
    ("value", "unit", "largest", "shown"),
    [
        (0.05, "s", 0.2, "50 ms"), (2.0, "s", 3.0, "2 s"), (512 * 1024, "bytes", 2**20, "0.5 MiB"),
        (10.0, "Bps", 100.0, "10 B/s"), (0.9, "percentunit", 1.0, "90 %"), (400.0, "cps", 400.0, "400/s"),
        (3.0, "none", 3.0, "3"),
    ],
)  # fmt: skip
def test_axes_have_units(value: float, unit: str, largest: float, shown: str) -> None:
    """The prefix is that of the largest value of the axis."""
    factor, suffix = axis_unit(unit, largest)
    assert f"{value * factor:.3g}{suffix}" == shown
    axes = Figure().add_subplot()
    draw_plot(axes, plot("lines", unit=unit, a=[largest, value]), TIMELINE)
    assert axes.yaxis.get_major_formatter()(value * factor, 0) == shown


def test_a_limit_is_shown_when_it_is_near() -> None:
    """A red line from half of it on, and no axis that is stretched for a limit that is far away."""
    assert limits(drawn("lines", red=10.0, a=[6.0])) == [10.0]
    far = drawn("lines", red=10.0, a=[1.0])
    assert limits(far) == []
    assert far.get_ylim()[1] < 2


def test_nothing_to_show_is_drawn_too() -> None:
    """A panel without a series has its axes and no line."""
    assert "one" in texts(ElementTree.fromstring(draw("A", [], [plot("lines")], TIMELINE)))
    assert [line for line in drawn("lines").lines if line.get_linestyle() != ":"] == []


def test_legends_are_grafanas() -> None:
    """`{{label}}` is the value of a label."""
    assert legend("{{kind}} {{state}}", {"kind": "move", "state": "done"}) == "move done"


def test_figures_show_panels_of_the_dashboard() -> None:
    """Each figure names panels by title, no panel appears twice, and the files are those of FIGURES."""
    chosen = [name for _, names in FIGURES.values() for name in names]
    assert set(chosen) <= {panel.title for row in ROWS.values() for panel in row}
    assert len(chosen) == len(set(chosen))
    assert sorted(path.name for path in IMAGES.glob("monitoring-*")) == sorted(FIGURES)


def test_services_do_not_import_matplotlib() -> None:
    """Nothing outside docs/tools and the tests imports it: it is a development dependency."""
    for folder in ("owner", "processor", "tablewire", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in names if name.split(".")[0] == "matplotlib" or name.startswith("docs.")], path


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_is(name: str) -> None:
    """It is well-formed, small, shown by the page, has its panels and a series in each, and does not pass for Grafana."""
    text = (IMAGES / name).read_text()
    assert len(text) <= SIZE_MAX
    picture = ElementTree.fromstring(text)
    shown = texts(picture)
    title, panels = FIGURES[name]
    assert {title, *panels} <= set(shown)
    assert NOT_GRAFANA in " ".join(shown)
    assert any(line.startswith("Events: 1: planned move") for line in shown)
    assert not re.search(r"\b127\.\d+\.\d+\.\d+", text), "addresses are replaced by names"
    page = " ".join((ROOT / "docs/monitoring.md").read_text().split())
    assert f"](images/{name})" in page
    assert NOT_GRAFANA in page
    assert [group for group in axes_of(picture) if not colours(group)] == []
    assert len(axes_of(picture)) == len(panels)


def axes_of(picture: ElementTree.Element) -> list[ElementTree.Element]:
    return [group for group in picture.iter(f"{SVG}g") if re.fullmatch(r"axes_\d+", group.get("id", ""))]


def colours(group: ElementTree.Element) -> set[str]:
    """Return the palette's colours that the plot of a panel uses, its legend aside."""
    lines = [part for part in group if not part.get("id", "").startswith("legend")]
    return set(COLOURS) & set(re.findall(r"#[0-9a-f]{6}", "".join(ElementTree.tostring(part, "unicode") for part in lines)))
