"""Draws the figure of docs/influence.md from a run's report.json: what drafts did, and what the gate made of them.

python docs/figures.py runs/handbook        # after make demo; writes docs/influence.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from markupsafe import Markup

from cowest_dspy.report import RunReport, influence_counts, read_report
from cowest_dspy.report.charts import Axis, Row, bars

HERE = Path(__file__).resolve().parent
# A file of its own has no page around it that says what its colours are.
STYLE = """
svg { --ink: #1c2128; --soft: #59616e; --paper: #ffffff; --grid: #e8e5df; --helped: #0b7a6b; --same: #868e9b; --hurt: #b93c0b;
--failed: #454d59; --plain: #808a98 } text { font-family: system-ui, sans-serif }
@media (prefers-color-scheme: dark) { svg { --ink: #e7e9ec; --soft: #a6aebb; --paper: #14171b; --grid: #282d35; --helped: #3cc4ad;
--same: #6b7585; --hurt: #f58a4b; --failed: #aab3c0; --plain: #778294 } }
"""


def drawing(report: RunReport) -> Markup:
    """The figure: bars of drafts by what they did, then bars of examples by what the gate said."""
    counts, pairs = influence_counts(report.influence), report.pairs
    found = [(f"drafts: {name}", getattr(counts, name), name) for name in ("helped", "same", "hurt", "failed")]
    if pairs:
        found.append(("gate: kept as a pair", pairs.kept, "helped"))
        found += [(f"gate: {why}", count, "plain") for why, count in sorted(pairs.dropped.items())]
    rows = [Row(name, count, f"{name}, {count:,}", kind=kind, text=f"{count:,}") for name, count, kind in found]
    label = f"{counts.helped} drafts helped, {counts.same} changed nothing, {counts.hurt} hurt, {counts.failed} failed"
    axis = Axis(0.0, float(max((count for _, count, _ in found), default=1) or 1), (), "''")
    wide = str(bars(rows, label, axis)).partition("</svg>")[0]
    inside = wide.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f"><style>{STYLE}</style>", 1)
    return Markup(inside + "</svg>")


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
