"""From a Vega-Lite specification to the inline SVG of a page: drawn here, so that the page needs no
script, font or request.

vl-convert runs Vega-Lite without a browser. What it draws is parsed and cut down to what a page
needs. Colours are the page's CSS variables (``fill="var(--helped)"``), so that the same drawing is
light or dark as its page is. The whole is one image with a label, for screen readers; a mark's
description is its ``<title>``, which browsers show where the pointer rests. Ids are those of one
drawing only, and there is no style attribute, which the page's content security policy would
refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from cowest_dspy.errors import ReportError
from cowest_dspy.utils.extras import check_extra

# Characters that XML does not allow. A text of a model may hold them.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_PLAIN = {
    "opacity": "1",
    "stroke-width": "1",
    "fill-opacity": "1",
    "stroke-opacity": "1",
    "font-weight": "normal",
}
_DROPPED = ("role", "pointer-events", "font-family", "style", "stroke-miterlimit")

CONFIG: dict[str, Any] = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "grid": True,
        "gridColor": "var(--grid)",
        "labelColor": "var(--soft)",
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleColor": "var(--soft)",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "text": {"fontSize": 13, "fill": "var(--ink)", "lineBreak": "\n", "lineHeight": 16},
}


def draw(specification: Mapping[str, Any], label: str, kind: str = "") -> Markup:
    """The drawing of a Vega-Lite specification as one ``<svg role="img">``; ``kind`` is its class.

    The same specification gives the same bytes. Colours of the specification may be CSS variables
    of the page.

    Raises:
        ReportError: the extra "charts" is not installed.
    """
    whole = json.dumps(xml_text({"config": CONFIG, **specification}), ensure_ascii=False)
    return _drawn(whole, str(xml_text(label)), kind)


@lru_cache(maxsize=64)
def _drawn(specification: str, label: str, kind: str) -> Markup:
    check_extra("charts", "Drawing a chart", ReportError)
    import vl_convert

    text = vl_convert.vegalite_to_svg(specification)
    root = ElementTree.fromstring(text.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))
    prefix = hashlib.sha256(specification.encode()).hexdigest()[:8]
    _clean(root, prefix)
    size = {name: root.attrib[name] for name in ("viewBox", "width", "height")}
    root.attrib = {"class": f"chart {kind}".strip(), "role": "img", "aria-label": label, **size}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True))


def xml_text(value: Any) -> Any:
    """A copy of JSON values without the characters that XML does not allow."""
    if isinstance(value, Mapping):
        return {key: xml_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [xml_text(item) for item in value]
    return _NOT_XML.sub("\ufffd", value) if isinstance(value, str) else value


def _clean(node: ElementTree.Element, prefix: str, axis: bool = False) -> None:
    """Cuts the element down and goes on with its children; those that show nothing go."""
    axis = axis or "role-axis" in node.get("class", "")
    title = node.get("aria-label")
    described = node.get("role") == "graphics-symbol" and not axis
    for name in list(node.attrib):
        value = node.attrib[name]
        if name.startswith("aria-") or name in _DROPPED or _PLAIN.get(name) == value:
            del node.attrib[name]
        elif name == "id":
            node.attrib[name] = f"{prefix}-{value}"
        elif name == "clip-path":
            node.attrib[name] = value.replace("url(#", f"url(#{prefix}-")
        elif name in ("d", "transform", "x", "y", "x2", "y2", "width", "height"):
            node.attrib[name] = _LONG_NUMBER.sub(
                lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value
            )
    for child in list(node):
        _clean(child, prefix, axis)
        if _empty(child):
            node.remove(child)
    if described and title:
        title_node = ElementTree.Element("title")
        title_node.text = title
        node.insert(0, title_node)


def _empty(node: ElementTree.Element) -> bool:
    """Vega draws backgrounds and foregrounds of groups, which have no colour here; and groups
    without marks."""
    if (
        node.get("display") == "none"
        or node.get("fill") == "transparent"
        or node.get("class") in ("background", "foreground")
    ):
        return True
    return node.tag in ("g", "defs") and len(node) == 0
