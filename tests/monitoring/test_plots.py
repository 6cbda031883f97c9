"""The pictures of the documentation: drawn as they should be, small, and saying what they are."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deploy.monitoring.panels import BARS, LINES, ROWS, STACK
from deploy.monitoring.plots import FIGURES, NOT_GRAFANA, legend
from deploy.monitoring.svg import COLOURS, Line, Plot, Span, figure, runs, shown

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
SIZE_MAX = 150_000
SVG = "{http://www.w3.org/2000/svg}"
SPAN = Span(0.0, 10.0, ((4.0, "leader <killed>"),))


def drawn(kind: str, *lines: Line, unit: str = "short", red: float | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(figure("A & B", ["caption"], [Plot("one", kind, unit, lines, 1.0, red)], SPAN))


def paths(picture: ElementTree.Element, colour: str, attribute: str = "stroke") -> list[str]:
    return [path.attrib["d"] for path in picture.iter(f"{SVG}path") if path.get(attribute) == colour]


def texts(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


def test_a_gap_is_a_gap() -> None:
    """Where points are missing the line is broken, and a point alone is a dot."""
    points = [(0.0, 1.0), (1.0, 2.0), (4.0, 3.0), (7.0, 1.0), (8.0, 1.0)]
    assert [len(run) for run in runs(points, 1.0)] == [2, 1, 2]
    assert len(paths(drawn(LINES, Line("a", points)), COLOURS[0])) == 3


def test_a_stack_stands_on_what_is_below() -> None:
    """The second line's box begins where the first one's ends; equal neighbours are one box, and missing ones none."""
    picture = drawn(STACK, Line("a", [(0.0, 2.0), (1.0, 2.0), (2.0, 2.0), (5.0, 2.0)]), Line("b", [(1.0, 1.0)]))
    (first,), (second,) = (paths(picture, COLOURS[index], "fill") for index in (0, 1))
    boxes = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)", first)
    assert len(boxes) == 2
    ((_, _, _, bottom),) = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)", second)
    assert bottom == boxes[0][1]


def test_a_bar_stands_before_its_time() -> None:
    """An increase is what happened in the step that ends there."""
    (bar,) = paths(drawn(BARS, Line("a", [(3.0, 0.0), (4.0, 1.0)])), COLOURS[0], "fill")
    (line,) = [path for path in drawn(LINES, Line("a", [(4.0, 1.0)])).iter(f"{SVG}path") if path.get("stroke-dasharray") == "2 3"]
    mark = re.match(r"M([\d.]+)", line.attrib["d"])
    assert mark is not None
    assert f"H{mark[1]}V" in bar


def test_text_is_text() -> None:
    """Names, titles and events are escaped; events are numbered and told below."""
    said = texts(drawn(LINES, Line("<x>", [(1.0, 1.0)])))
    assert {"A & B", "one", "<x>", "1", "Events: 1: leader <killed>, 4 s", "caption"} <= set(said)


@pytest.mark.parametrize(
    ("value", "unit", "largest", "said"),
    [
        (0.05, "s", 0.2, "50 ms"), (2.0, "s", 3.0, "2 s"), (512 * 1024, "bytes", 2**20, "0.5 MiB"),
        (10.0, "Bps", 100.0, "10 B/s"), (0.9, "percentunit", 1.0, "90 %"), (400.0, "cps", 400.0, "400/s"),
        (3.0, "none", 3.0, "3"),
    ],
)  # fmt: skip
def test_axes_have_units(value: float, unit: str, largest: float, said: str) -> None:
    """As people read them, with the prefix of the axis' largest value."""
    assert shown(value, unit, largest) == said


def test_a_limit_is_shown_when_it_is_near() -> None:
    """A red line at half of it and more, and no axis that is stretched for a limit that is far away."""
    assert paths(drawn(LINES, Line("a", [(1.0, 6.0)]), red=10.0), "#c00")
    assert not paths(drawn(LINES, Line("a", [(1.0, 1.0)]), red=10.0), "#c00")


def test_nothing_to_show_is_drawn_too() -> None:
    """A panel without a series has its axes and no line."""
    assert "one" in texts(drawn(LINES))


def test_legends_are_grafanas() -> None:
    """`{{label}}` is the value of a label."""
    assert legend("{{kind}} {{state}}", {"kind": "move", "state": "done"}) == "move done"


def test_pictures_show_panels_of_the_dashboard() -> None:
    """By their titles, no panel twice, and the figures are those that are there."""
    chosen = [name for _, names in FIGURES.values() for name in names]
    assert set(chosen) <= {panel.title for row in ROWS for panel in row.panels}
    assert len(chosen) == len(set(chosen))
    assert sorted(path.name for path in IMAGES.glob("monitoring-*")) == sorted(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_says_what_it_is(name: str) -> None:
    """It is well-formed, small, shown by the page, has its panels and a line in each, and does not pass for Grafana."""
    text = (IMAGES / name).read_text()
    assert len(text) <= SIZE_MAX
    picture = ElementTree.fromstring(text)
    said = texts(picture)
    title, panels = FIGURES[name]
    assert {title, *panels} <= set(said)
    assert NOT_GRAFANA in " ".join(said)
    assert any(line.startswith("Events: 1: planned move") for line in said)
    assert not re.search(r"\b127\.\d+\.\d+\.\d+", text), "addresses are replaced by names"
    page = (ROOT / "docs/monitoring.md").read_text()
    assert f"](images/{name})" in page
    assert NOT_GRAFANA in page
    for group in picture.findall(f"{SVG}g"):
        colours = {path.get("stroke") for path in group.iter(f"{SVG}path")} | {
            path.get("fill") for path in group.iter(f"{SVG}path")
        }
        assert colours & set(COLOURS), texts(group)[0]
