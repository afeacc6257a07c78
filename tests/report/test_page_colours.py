"""The colours of the pages, light and dark, can be told apart: WCAG 2.2 AA, from the CSS itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowest_dspy import report

PAGE = Path(report.__file__ or "") / ".." / "templates" / "page.css"
DARK = "@media screen and (prefers-color-scheme: dark)"
GROUNDS = ("paper", "card", "open", "good", "bad")
TEXTS = ("ink", "soft", "accent", "helped", "hurt")
MARKS = (
    "plain",
    "helped",
    "hurt",
    "same",
    "failed",
    "accent",
    "second",
    "edge",
    *(f"s{index}" for index in range(6)),
)


def palettes() -> dict[str, dict[str, str]]:
    """The variables of the style sheet as a light and as a dark page has them."""
    light, dark = dict[str, str](), dict[str, str]()
    before, *after = PAGE.resolve().read_text(encoding="utf-8").split(DARK)
    light |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", before))
    for part in after:
        inside, outside = part.partition("}")[0], part.partition("}")[2]
        dark |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", inside))
        light |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", outside))
    return {"light": light, "dark": light | dark}


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG 2.2 defines it, in [0, 1]."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast(
        "#777777", "#ffffff"
    ) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(theme: str) -> None:
    colours = palettes()[theme]
    pairs = [(text, ground) for text in TEXTS for ground in GROUNDS]
    pairs += [(f"on-{kind}", kind) for kind in ("helped", "hurt", "same", "failed", "plain")]
    found = {pair: round(contrast(colours[pair[0]], colours[pair[1]]), 2) for pair in pairs}
    assert {pair: ratio for pair, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_and_edges_have_a_contrast_of_at_least_3(theme: str) -> None:
    colours = palettes()[theme]
    found = {
        (mark, ground): round(contrast(colours[mark], colours[ground]), 2)
        for mark in MARKS
        for ground in ("paper", "card")
    }
    assert {pair: ratio for pair, ratio in found.items() if ratio < 3} == {}


def test_both_themes_name_the_same_colours_of_charts() -> None:
    found = palettes()
    assert set(found["light"]) == set(found["dark"]) and all(
        found["light"][name] != found["dark"][name] for name in MARKS
    )
