"""Draws docs/rooms.svg (`make rooms`): how a job flows through the rooms of the code. A test compares it with these."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).with_name("rooms.svg")
WIDTH, HEIGHT, LINE = 1000, 706, 17

STEPS = ("download", "tokens", "reload", "dataset", "train", "save")
SHARED = {
    "workspace": "what a step leaves is complete or absent; the form of every file that several steps know",
    "model_files": "safetensors, index, config",
    "token_matrices": "one row for each token",
    "weight_names": "names in memory and files",
    "tokenizer_files": "every reader, the same ids",
    "dequantisation": "FP8, MXFP4, int: bf16",
    "rows": "from claims, buckets and hubs",
    "inference": "what a loaded model says",
    "cache.py": "shared by jobs",
    "runtime": "failure, progress, stop, disk",
}
CONTROLLER = ("cluster", "decision", "serving")


class Point(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """A rectangle with a name and what is in it; `room` for a folder of the code."""

    x: float
    y: float
    width: float
    height: float
    name: str
    lines: tuple[str, ...] = ()
    kind: str = "room"

    @property
    def top(self) -> Point:
        return Point(self.x + self.width / 2, self.y)

    @property
    def bottom(self) -> Point:
        return Point(self.x + self.width / 2, self.y + self.height)

    @property
    def left(self) -> Point:
        return Point(self.x, self.y + self.height / 2)

    @property
    def right(self) -> Point:
        return Point(self.x + self.width, self.y + self.height / 2)

    def svg(self) -> str:
        name = f'<tspan class="name">{escape(self.name)}</tspan>'
        if self.height < 2 * LINE + 10 and self.lines:  # one line for both
            name += f'<tspan dx="10">{escape(self.lines[0])}</tspan>'
        text = [f'<text x="{self.x + 12:g}" y="{self.y + 24:g}">{name}</text>']
        if self.height >= 2 * LINE + 10:
            text += [
                f'<text x="{self.x + 12:g}" y="{self.y + 26 + LINE * number:g}">{escape(line)}</text>'
                for number, line in enumerate(self.lines, start=1)
            ]
        size = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}"'
        return f'<rect class="{self.kind}" rx="6" {size}/>' + "".join(text)


def arrow(start: Point, end: Point, label: str = "", *, beside: Point | None = None) -> str:
    """A straight arrow; its label stands beside its middle, or where `beside` says."""
    place = beside or Point((start.x + end.x) / 2 + 8, (start.y + end.y) / 2 + 4)
    line = f'<line x1="{start.x:g}" y1="{start.y:g}" x2="{end.x:g}" y2="{end.y:g}" marker-end="url(#head)"/>'
    return line + (f'<text class="label" x="{place.x:g}" y="{place.y:g}">{escape(label)}</text>' if label else "")


def picture() -> str:
    """The whole SVG."""
    user = Box(20, 20, 150, 62, "kubectl, finetune", ("a FineTuneJob",), "outside")
    server = Box(250, 20, 500, 62, "API server", ("FineTuneJobs, Jobs, Pods, claims, Events, a Lease",), "outside")
    people = Box(830, 20, 150, 62, "people, metrics", ("conditions, progress",), "outside")
    operator = Box(20, 130, 960, 170, "controller: one replica leads", (), "floor")
    cluster = Box(
        40,
        165,
        300,
        118,
        "cluster",
        (
            "access, client: the official client",
            "watches, resync → store → queue",
            "reconciler → apply; backoff; lease",
        ),
    )
    decision = Box(
        440,
        165,
        240,
        118,
        "decision",
        (
            "pure: observed → decide",
            "stages: prepare, train, save",
            "signals: how an attempt ended",
            "draft, budget, findings",
        ),
    )
    serving = Box(790, 165, 170, 118, "serving", ("progress, senders", "trust, certificates", "health, metrics"))
    pods = Box(20, 350, 960, 336, "steps: what the pods of an attempt run", (), "floor")
    steps = [Box(40 + 156 * number, 385, 140, 40, name) for number, name in enumerate(STEPS)]
    workspace = Box(40, 470, 920, 54, "workspace", (SHARED["workspace"],), "shared")
    places = [(40 + 310 * column, 536 + 46 * row, 300) for row in range(3) for column in range(3)]
    shared = [workspace]
    for (name, text), (x, y, span) in zip(list(SHARED.items())[1:], places, strict=False):
        shared.append(Box(x, y, span, 38, name, (text,), "shared"))
    parts = [operator, pods, user, server, people, cluster, decision, serving, *steps, *shared]
    arrows = [
        arrow(user.right, server.left, "apply", beside=Point(190, 44)),
        arrow(server.right, people.left, "watch", beside=Point(770, 44)),
        arrow(Point(290, 82), Point(290, 165), "lists, watches", beside=Point(196, 112)),
        arrow(Point(320, 165), Point(320, 82), "creates, and one status write", beside=Point(330, 112)),
        arrow(Point(340, 205), Point(440, 205), "Observed", beside=Point(358, 197)),
        arrow(Point(440, 250), Point(340, 250), "Decision", beside=Point(362, 268)),
        arrow(Point(830, 165), Point(735, 82), "status.progress", beside=Point(800, 112)),
        arrow(Point(735, 300), Point(735, 350), "Jobs, and their pods", beside=Point(612, 330)),
        arrow(Point(875, 350), Point(875, 283), "progress, by HTTPS", beside=Point(755, 330)),
        *(arrow(first.right, second.left) for first, second in itertools.pairwise(steps)),
        *(arrow(step.bottom, Point(step.bottom.x, workspace.y)) for step in steps),
    ]
    drawn = "\n".join([box.svg() for box in parts[:2]] + arrows + [box.svg() for box in parts[2:]])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>How a job flows through the rooms of the code</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #24292f; }}
.name {{ font-weight: 600; font-size: 14px; }}
.label {{ font-size: 12px; fill: #57606a; }}
line {{ stroke: #57606a; stroke-width: 1.5; }}
rect {{ stroke: #8c959f; }}
.outside {{ fill: #ffffff; stroke-dasharray: 4 3; }}
.floor {{ fill: #f6f8fa; stroke: #d0d7de; }}
.room {{ fill: #ddf4ff; stroke: #54aeff; }}
.shared {{ fill: #fff8c5; stroke: #d4a72c; }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#57606a"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff" stroke="none"/>
{drawn}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture())
