"""The frame of a page that needs nothing else: templates, style, scripts, and the forms of numbers."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ablate_shards.errors import ReportError

__all__ = ["GAP", "chance", "figure", "fill", "percent"]

_PARTS = resources.files("ablate_shards.data") / "report"
GAP = "\N{NARROW NO-BREAK SPACE}"


def fill(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """Returns a page made of a template.

    All that comes from files is escaped: the template escapes by itself, the data of the charts are JSON without
    ``<``, and the page's policy runs no script but its own.

    Args:
        template: Its name.
        data: What the page's charts show, in JSON types.
        context: What the template calls for besides.

    Raises:
        ReportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ReportError("a page needs jinja2: pip install 'ablate-shards[report]'") from error
    scripts = [(_PARTS / name).read_text(encoding="utf-8") for name in ("plot.min.js", "report.js")]
    environment = Environment(
        loader=PackageLoader("ablate_shards.data", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "fixed": _fixed, "chance": chance}
    return environment.get_template(template).render(
        **context,
        data=_escaped(data),
        style=(_PARTS / "report.css").read_text(encoding="utf-8"),
        scripts=scripts,
        policy=" ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts
        ),
    )


def _escaped(data: Any) -> str:
    """Returns JSON that ends no script element, whatever it holds."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def percent(value: float, digits: int = 1) -> str:
    """Returns a share as a percentage."""
    return f"{100 * value:.{digits}f}{GAP}%"


def figure(value: float | None) -> str:
    """Returns a number with three significant digits, without an exponent where that is readable."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-5 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"


def chance(p: float) -> str:
    """Returns a p value as a person reads it."""
    return "< 0.0001" if p < 0.0001 else figure(p)


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
