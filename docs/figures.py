"""Draws the figures of the documentation.

python docs/figures.py                      # writes docs/round.svg: one round, for docs/index.md
python docs/figures.py runs/handbook        # after make demo; writes docs/influence.svg: what drafts did, and what became of them
"""

from __future__ import annotations

import argparse
from pathlib import Path

from markupsafe import Markup

from cowest_dspy.report import RunReport, influence_counts, read_report
from cowest_dspy.report.charts import tag

HERE = Path(__file__).resolve().parent
WIDTH, LEFT, ROW, BAR = 760, 250, 34, 22
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c2128 } .soft { fill: #59616e } .head { font-weight: 600 }
.helped { fill: #0b7a6b } .same { fill: #c3c8d0 } .hurt { fill: #c2410c } .failed { fill: #4d5562 } .dropped { fill: #a9b1bd }
@media (prefers-color-scheme: dark) {
  text { fill: #e7e9ec } .soft { fill: #a2abb8 } .helped { fill: #3cc4ad } .same { fill: #505966 } .hurt { fill: #f58a4b }
}
"""


def drawing(report: RunReport) -> Markup:
    """The figure: bars of drafts by what they did, then bars of examples by what the gate said."""
    counts = influence_counts(report.influence)
    pairs = report.pairs
    drafts = [(name, getattr(counts, name), name) for name in ("helped", "same", "hurt", "failed")]
    gate = (
        [("kept as a pair", pairs.kept, "helped"), *((why, n, "dropped") for why, n in sorted(pairs.dropped.items()))]
        if pairs
        else []
    )
    rows: list[Markup] = []
    y = 20
    for title, bars in ((f"What {counts.n} drafts did to the strong model's answer", drafts), ("What the gate made of them", gate)):
        rows.append(tag("text", title, x=0, y=y, class_="head"))
        y += 12
        longest = max((count for _, count, _ in bars), default=1) or 1
        for name, count, kind in bars:
            width = max(1.0, (WIDTH - LEFT - 60) * count / longest)
            rows.append(tag("text", name, x=LEFT - 10, y=y + 16, text_anchor="end"))
            rows.append(tag("rect", x=LEFT, y=y, width=width, height=BAR, rx=2, class_=kind))
            rows.append(tag("text", str(count), x=LEFT + width + 6, y=y + 16, class_="soft"))
            y += ROW
        y += 24
    label = f"{counts.helped} drafts helped, {counts.same} changed nothing, {counts.hurt} hurt, {counts.failed} failed"
    style = tag("style", Markup(STYLE))
    box = f"0 0 {WIDTH} {y - 20}"
    return tag("svg", style + Markup().join(rows), xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", aria_label=label)


# Boxes of the figure of a round: name, what it says, place, and how it looks.
BOXES = (
    ("question", ("question",), (-42, 62), "plain"),
    ("weak", ("weak model", "drafts n times"), (150, 16), "weak"),
    ("refine", ("strong model", "refines each draft"), (330, 16), "strong"),
    ("alone", ("strong model alone", "no draft, asked once"), (330, 108), "strong"),
    ("influence", ("influence", "refined less alone"), (530, 62), "plain"),
    ("gate", ("gate", "best ≻ worst draft"), (530, 178), "plain"),
    ("tune", ("DPO", "tunes the weak model"), (330, 200), "weak"),
)
SIZE = (150, 50)
# Arrows as SVG paths.
ARROWS = (
    "M108 81 C130 81 125 41 148 41",
    "M108 93 C130 93 130 133 150 133 H328",
    "M300 41 H328",
    "M480 41 C510 41 505 80 528 82",
    "M480 133 C510 133 505 94 528 92",
    "M605 112 V176",
    "M530 205 C510 205 505 225 482 225",
    "M330 225 C225 225 225 130 225 68",
)
ROUND_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c2128; text-anchor: middle } .soft { fill: #59616e; font-size: 12px }
.head { font-weight: 600 } rect { stroke-width: 1.5; fill: #fff; stroke: #8b949e }
.weak { stroke: #0b7a6b } .strong { stroke: #4457c4 }
path { fill: none; stroke: #59616e; stroke-width: 1.5; marker-end: url(#tip) }
#tip path { fill: #59616e; stroke: none; marker-end: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e7e9ec } .soft { fill: #a2abb8 } rect { fill: #1c2128 } .weak { stroke: #3cc4ad } .strong { stroke: #93a1ff }
  path { stroke: #a2abb8 } #tip path { fill: #a2abb8 }
}
"""


def round_drawing() -> Markup:
    """The figure of a round: who is asked, what is compared, who is tuned."""
    width, height = SIZE
    rows: list[Markup] = []
    for _, (name, *more), (x, y), kind in BOXES:
        rows.append(tag("rect", x=x, y=y, width=width, height=height, rx=6, class_=kind))
        rows.append(tag("text", name, x=x + width / 2, y=y + (20 if more else 30), class_="head"))
        rows.extend(tag("text", line, x=x + width / 2, y=y + 38, class_="soft") for line in more)
    rows.extend(tag("path", d=path) for path in ARROWS)
    tip = tag("path", d="M0 0 L8 4 L0 8 Z")
    marker = tag("marker", tip, id="tip", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7, orient="auto")
    style = tag("style", Markup(ROUND_STYLE))
    label = "the strong model answers with each draft and alone; the difference is the influence, and the weak model is tuned on it"
    content = style + tag("defs", marker) + Markup().join(rows)
    return tag("svg", content, xmlns="http://www.w3.org/2000/svg", viewBox="-46 0 732 262", role="img", aria_label=label)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder, or its report.json")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or HERE / ("influence.svg" if given.run else "round.svg")
    out.write_text(str(drawing(read_report(given.run)) if given.run else round_drawing()) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
