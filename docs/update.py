"""Write what the pages show of the registries: margins as a table and a picture, and the formats of data sets.

python docs/update.py
"""

from __future__ import annotations

import re
from pathlib import Path

from fused_arcface.app.data import formats
from fused_arcface.app.drawing import write_pictures
from fused_arcface.app.lab.margin_pictures import margin_drawings
from fused_arcface.margins import registry

DOCS = Path(__file__).resolve().parent
LISTS = {
    "margins": registry.as_markdown(),
    "formats of labeled images": formats.as_markdown(),
    "formats of pairs": formats.as_markdown(pairs=True),
}
"""The text for each pair of markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""


def with_lists(page: str) -> str:
    """Return the page with the registries' lists between their markers."""

    def current(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{LISTS[found[1]]}<!-- /{found[1]} -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- /\1 -->", current, page, flags=re.S)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(with_lists(page.read_text(encoding="utf-8")), encoding="utf-8")
    of_the_angle, *_ = margin_drawings(scale=1.0)
    write_pictures([of_the_angle._replace(name="margins")], DOCS)
