"""Draws the figures of the documentation.

python docs/figures.py                      # writes docs/round.svg: one round, for docs/index.md
python docs/figures.py runs/handbook        # after make demo; writes docs/influence.svg: what
    drafts did, and what became of them
"""

from __future__ import annotations

import argparse
from pathlib import Path

from markupsafe import Markup, escape

from cowest_dspy.report import RunReport, influence_counts, read_report
from cowest_dspy.report.charts import Axis, ChartRow, bars

HERE = Path(__file__).resolve().parent
# A file of its own has no page around it that says what its colours are.
STYLE = """
svg { --ink: #1c2128; --soft: #59616e; --paper: #ffffff; --grid: #e8e5df; --helped: #0b7a6b; --same: #868e9b; --hurt: #b93c0b;
--failed: #454d59; --plain: #808a98 } text { font-family: system-ui, sans-serif }
@media (prefers-color-scheme: dark) { svg { --ink: #e7e9ec; --soft: #a6aebb; --paper: #14171b; --grid: #282d35; --helped: #3cc4ad;
--same: #6b7585; --hurt: #f58a4b; --failed: #aab3c0; --plain: #778294 } }
"""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; children that are no Markup are escaped, attributes always. ``class_`` is class,
    ``aria_label`` is aria-label."""
    inside = Markup("").join(escape(child) for child in children)
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), given, inside, Markup(name))


def drawing(report: RunReport) -> Markup:
    """The figure: bars of drafts by what they did, then bars of examples by what the gate said."""
    counts, pairs = influence_counts(report.traces), report.pairs
    found = [
        (f"drafts: {name}", getattr(counts, name), name)
        for name in ("helped", "same", "hurt", "failed")
    ]
    if pairs:
        found.append(("gate: kept as a pair", pairs.kept, "helped"))
        found += [(f"gate: {why}", count, "plain") for why, count in sorted(pairs.dropped.items())]
    rows = [
        ChartRow(name, count, f"{name}, {count:,}", kind=kind, text=f"{count:,}")
        for name, count, kind in found
    ]
    label = (
        f"{counts.helped} drafts helped, {counts.same} changed nothing, {counts.hurt} hurt, "
        f"{counts.failed} failed"
    )
    axis = Axis(0.0, float(max((count for _, count, _ in found), default=1) or 1), (), "''")
    wide = str(bars(rows, label, axis)).partition("</svg>")[0]
    inside = wide.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}</style>", 1
    )
    return Markup(inside + "</svg>")


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
    marker = tag(
        "marker",
        tip,
        id="tip",
        viewBox="0 0 8 8",
        refX=7,
        refY=4,
        markerWidth=7,
        markerHeight=7,
        orient="auto",
    )
    style = tag("style", Markup(ROUND_STYLE))
    label = (
        "the strong model answers with each draft and alone; the difference is the influence, "
        "and the weak model is tuned on it"
    )
    content = style + tag("defs", marker) + Markup().join(rows)
    return tag(
        "svg",
        content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox="-46 0 732 262",
        role="img",
        aria_label=label,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="a run folder, or its report.json")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or HERE / ("influence.svg" if given.run else "round.svg")
    out.write_text(
        str(drawing(read_report(given.run)) if given.run else round_drawing()) + "\n",
        encoding="utf-8",
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
