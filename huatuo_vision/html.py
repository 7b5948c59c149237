"""One self-contained page: nothing is fetched, and nothing of other people's text can become markup or script."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# What could end the script element, start a comment in it, or a line where an old parser sees one.
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(
    template: Path,
    *,
    data: Mapping[str, object] | None = None,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """The page of a template that extends `page.html.jinja` and fills its blocks style, body and script.

    `values` (`title` among them) are what the template prints, always escaped. `data` is what its script reads, by
    name: `JSON.parse(document.getElementById("data-NAME").textContent)`.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters or {})
    embedded = {name: script_json(value) for name, value in (data or {}).items()}
    return encodable(environment.get_template(template.name).render(data=embedded, **values))


def script_json(value: object) -> Markup:
    """JSON that is safe inside a script element. Raises ValueError for NaN and infinities, which JSON has none of."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_IN_SCRIPT))


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair, which a JSON file may contain, becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
