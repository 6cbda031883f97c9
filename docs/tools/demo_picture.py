"""docs/images/demo.svg, recorded from a real demo run: `make demo-picture`, or `python -m docs.tools.demo_picture FILE`.

The picture shows the live view of `make demo` before, during and after each of the two kills, and the result. It is an SVG with a
CSS animation and without scripts or fonts of its own; a viewer that does not animate shows the result.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from deploy.local import demo
from deploy.local.admin import Json
from deploy.local.observer import View
from deploy.local.report import Report, summary
from deploy.local.screen import Screen
from deploy.local.session import session

COLUMNS, LINES = 96, 24
INTERVAL_S = 0.2
FRAME_S = 3.5
SECONDS, RATE = 30.0, 400.0

FRAME = """<g class="frame"{delay}>
<style>
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="text">{matrix}</g></g>
</g>"""
PICTURE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>make demo: the leading owner and a processor are killed, and others take over</title>
<style>
.text {{ font: 20px Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
[class$=title] {{ font: bold 18px Helvetica, Arial, sans-serif; }}
.frame {{ opacity: 0; animation: show {total_s:g}s step-end infinite; }}
.frame:first-of-type {{ opacity: 1; animation: none; }}
@keyframes show {{ 0% {{ opacity: 1; }} {share:.3f}% {{ opacity: 0; }} }}
@media (prefers-reduced-motion: reduce) {{ .frame {{ animation: none; }} }}
</style>
{frames}
</svg>
"""


@dataclass(frozen=True)
class Shot:
    """The live view at one moment."""

    renderable: RenderableType
    view: View


class Recorder(Screen):
    """A screen that takes shots of the live view instead of drawing it."""

    def __init__(self) -> None:
        super().__init__(plain=False, console=Console(width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True))
        self.shots: list[Shot] = []
        self.events: list[tuple[str, int]] = []
        """Each event with the number of shots before it."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def say(self, text: str) -> None:
        super().say(text)
        self.events.append((text, len(self.shots)))
        print(text, flush=True)

    def _record(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if self._view is not None:
                self.shots.append(Shot(self.render(), self._view()))


def main() -> int:
    report, recorder = Report(), Recorder()
    with session(keep=False) as (run, stack), recorder:
        demo.perform(run, stack, recorder, report, seconds=SECONDS, rate=RATE)
    if report.problems:
        print("\n".join(summary(report)), file=sys.stderr)
        return 1
    Path(sys.argv[1]).write_text(picture(recorder.shots, recorder.events, report), encoding="utf-8")
    return 0


def picture(shots: list[Shot], events: list[tuple[str, int]], report: Report) -> str:
    """Return the SVG: the shots around the two kills, and the result as the still that is always there below them."""
    leader, processor = report.kills

    def shot_at(begin: str, end: str = "") -> int:
        return next(at for text, at in events if text.startswith(begin) and text.endswith(end))

    killed, led = shot_at("killing the leading owner"), shot_at(f"{leader.by[0]} has taken over")
    lost, taken = shot_at(f"killing {processor.node}"), shot_at(", ".join(processor.by), f"after {processor.seconds:.2f} s")
    headless = next((at for at in range(killed, led) if shots[at].view.leader is None), killed)
    stalled = max(range(lost, taken), key=lambda at: (sum(map(_waits, shots[at].view.tables)), at))
    chosen = [
        ("make demo: 12 tables on 3 processors, under load", shots[killed - 1].renderable),
        (f"{leader.node}, the leading owner, is killed: replication continues without a leader", shots[headless].renderable),
        (f"{leader.by[0]} leads after {leader.seconds:.1f} s", shots[led + 2].renderable),
        (f"{processor.node} is killed with {len(processor.tables)} tables", shots[stalled].renderable),
        (f"its tables replicate again after {processor.seconds:.1f} s, from their checkpoints", shots[taken + 2].renderable),
        ("the result", Text("\n".join(["$ make demo", *summary(report)]))),
    ]
    total_s = FRAME_S * len(chosen)
    still, *moving = [frame(number, title, shown) for number, (title, shown) in enumerate([chosen[-1], *chosen[:-1]])]
    width, height = re.findall(r'<rect[^>]* width="([\d.]+)" height="([\d.]+)" rx', still)[0]
    return PICTURE.format(
        width=float(width) + 2,
        height=float(height) + 2,
        total_s=total_s,
        share=100 / len(chosen),
        frames="\n".join([still, *moving]),
    )


def _waits(row: Json) -> bool:
    return row["state"] != "replicating" or bool(row["stall_reason"])


def frame(number: int, title: str, shown: RenderableType) -> str:
    """Return one frame as an SVG group; frame 0 is the still."""
    console = Console(record=True, width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(shown)
    lines = console.export_text(clear=False).count("\n")
    console.print("\n" * (LINES - lines - 1))
    delay = f' style="animation-delay: {FRAME_S * (number - 1):g}s"' if number else ""
    template = FRAME.replace("{delay}", delay)
    svg = console.export_svg(title=title, theme=SVG_EXPORT_THEME, unique_id=f"f{number}", code_format=template)
    return re.sub(r' clip-path="[^"]*"', "", svg)


if __name__ == "__main__":
    sys.exit(main())
