"""Draws the figure of docs/influence.md from a run's report.json: what drafts did, and what the gate made of them.

python docs/figures.py runs/handbook        # after make demo; writes docs/influence.svg
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or its report.json")
    parser.add_argument("--out", type=Path, default=HERE / "influence.svg")
    given = parser.parse_args()
    given.out.write_text(str(drawing(read_report(given.run))) + "\n", encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
