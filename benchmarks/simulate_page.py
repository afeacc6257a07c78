"""What simulate.py found, as tables between two marks of docs/scale.md, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marked import put
from simulation import RESOURCES, Outcome

from cowest_dspy.report.drawing import draw

BEGIN, END = "<!-- simulated: written by benchmarks/simulate.py -->", "<!-- end of simulated -->"
COLOURS = ("var(--hurt)", "var(--plain)", "var(--soft)", "var(--helped)")
# A file of its own has no page around it that says what its colours are.
STYLE = """
svg { --ink: #1c2128; --soft: #59616e; --grid: #e8e5df; --helped: #0b7a6b; --hurt: #b93c0b; --plain: #4457c4 }
text { font-family: system-ui, sans-serif } @media (prefers-color-scheme: dark) {
svg { --ink: #e7e9ec; --soft: #a6aebb; --grid: #282d35; --helped: #3cc4ad; --hurt: #f58a4b; --plain: #93a1ff } }
"""


@dataclass(frozen=True)
class Column:
    """One simulated case: its name, drivers, nodes, and what came of it."""

    name: str
    drivers: int
    nodes: int
    outcome: Outcome


@dataclass(frozen=True)
class Page:
    """What the tables say: measured, assumed, the points, the cases, examples to reckon for, drafts
    of each, calls of a trace."""

    measured: dict[str, Any]
    assumed: dict[str, Any]
    points: list[dict[str, float]]
    columns: list[Column]
    examples: Sequence[int]
    drafts: int
    calls: float

    def per_example(self, column: Column) -> float:
        """Examples a second of a case."""
        return column.outcome.rate / (2 * self.drafts + 1)


def tables(page: Page) -> str:
    """All tables, as Markdown."""
    return "\n\n".join([_times(page), _points(page), _cases(page), _runs(page), _costs(page)])


def write(page: Page, file: Path, figure: Path) -> None:
    """Puts the tables between the two marks of the page, and draws the figure."""
    put(file, BEGIN, END, tables(page))
    figure.write_text(drawing(page) + "\n", encoding="utf-8")


def drawing(page: Page) -> str:
    """Examples an hour by nodes, one line for each case."""
    names = list(dict.fromkeys(column.name for column in page.columns))
    values = [
        {"nodes": one.nodes, "rate": 3600 * page.per_example(one), "case": one.name}
        for one in page.columns
    ]
    scale = {"domain": names, "range": list(COLOURS[: len(names)])}
    specification = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 520,
        "height": 260,
        "data": {"values": values},
        "mark": {"type": "line", "point": True, "strokeWidth": 2},
        "encoding": {
            "x": {
                "field": "nodes",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "nodes",
                "axis": {"values": [1, 10, 100, 1000]},
            },
            "y": {
                "field": "rate",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "examples an hour",
                "axis": {"format": "~s"},
            },
            "color": {
                "field": "case",
                "type": "nominal",
                "scale": scale,
                "legend": {
                    "title": None,
                    "orient": "bottom",
                    "direction": "vertical",
                    "labelColor": "var(--ink)",
                    "labelLimit": 400,
                },
            },
        },
    }
    drawn = str(
        draw(
            specification, "Examples an hour by nodes: what each case is limited by is in the table"
        )
    )
    head, _, rest = drawn.partition(">")
    return f"{head.replace('<svg', '<svg xmlns=' + chr(34) + 'http://www.w3.org/2000/svg' + chr(34), 1)}><style>{STYLE}</style>{rest}"


def _times(page: Page) -> str:
    found, given = page.measured, page.assumed
    calls = ", ".join(f"{1000 * each:.3f}" for each in found["call"]) + " ms"
    rows = [
        [
            "a call, no store; 1, 8, 128, 512 threads",
            calls,
            "measured: `collect` on models that answer at once",
        ],
        [
            "keeping an answer, one thread, without its commit",
            _ms(found["keep"][0]),
            "measured: the store with its sync off",
        ],
        [
            "keeping an answer, 8 threads",
            _ms(found["keep"][1]),
            "measured: what the store adds to 8 threads that are never idle",
        ],
        [
            "a commit",
            _ms(found["sync"]),
            "measured: what the store adds to one thread, less the line above",
        ],
        [
            "a trace on the disk",
            f"{found['bytes'] / 1000:.1f} kB",
            "measured: short prompts; grows with theirs",
        ],
        [
            "a strong answer",
            f"{given['latency']:g} s, spread {given['spread']:.0%}",
            "assumed (`--latency`)",
        ],
        ["strong calls under way", f"{given['slots']} for each node", "assumed (`--slots`)"],
        [
            "drafts of a node's weak model",
            f"{given['drafts']:g} a second",
            "assumed (`--drafts`): a GPU",
        ],
        [
            "the same on two processor cores",
            f"{given['by_processor']:g} a second",
            "measured earlier: `bench_drafts.py`",
        ],
        ["an API's limit", f"{given['limit']:,.0f} calls a minute", "assumed (`--limit`)"],
    ]
    return _table(["time or size", "", "where from"], rows)


def _points(page: Page) -> str:
    rows = [
        [
            f"{one['threads']:.0f}",
            f"{1000 * one['latency']:.0f} ms",
            f"{one['traces']:,.0f}",
            f"{one['seconds']:.2f}",
            f"{one['simulated']:.2f}",
            f"{one['error']:+.0%}",
            f"{one['busy']:.0%}",
        ]
        for one in page.points
    ]
    return _table(
        ["threads", "strong answer", "traces", "measured s", "simulated s", "error", "driver busy"],
        rows,
    )


def _cases(page: Page) -> str:
    rows = [
        [
            one.name,
            f"{one.nodes:,}",
            f"{one.drivers}",
            f"{one.outcome.rate:,.0f}",
            *(f"{one.outcome.busy[name]:.0%}" for name in RESOURCES),
            one.outcome.bottleneck,
        ]
        for one in page.columns
    ]
    busy = ["weak slots", "strong slots", "rate limit", "driver", "store"]
    return _table(["case", "nodes", "drivers", "calls/s", *busy, "gives way first"], rows)


def _runs(page: Page) -> str:
    rows = []
    for one in page.columns:
        seconds = [count / page.per_example(one) for count in page.examples]
        rows.append([one.name, f"{one.nodes:,}", *(_long(each) for each in seconds)])
    return _table(["case", "nodes", *(f"{count:,} examples" for count in page.examples)], rows)


def _costs(page: Page) -> str:
    given, rows = page.assumed, []
    for count in page.examples:
        strong, weak = count * (page.drafts + 1), count * page.drafts
        tokens = [strong * each for each in given["tokens"]]
        usd = sum(each / 1e6 * price for each, price in zip(tokens, given["usd"], strict=True))
        disk = count * page.drafts * page.measured["bytes"]
        rows.append(
            [
                f"{count:,}",
                f"{weak:,}",
                f"{strong:,}",
                f"{sum(tokens) / 1e9:,.2f}",
                f"{usd:,.0f}",
                f"{disk / 1e9:,.1f}",
            ]
        )
    return _table(
        ["examples", "drafts", "strong calls", "10⁹ strong tokens", "USD", "GB on the disk"], rows
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in head[1:])]
    lines = [head, marks, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"


def _long(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.0f} s"
