"""Read a report as a strict reader would: its structure, its texts, its pictures, and that nothing points outside."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree

from PIL import Image

_VOID = {"meta", "img", "br", "hr", "col", "wbr"}
_ALLOWED = {
    *_VOID, "html", "head", "title", "style", "body", "header", "main", "section", "nav", "ul", "li", "a", "h1", "h2",
    "h3", "p", "div", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
_ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "ping", "cite"}


@dataclass
class Page:
    """A report that was read."""

    texts: list[str] = field(default_factory=list)
    """Every text of the body, in order."""
    titles: list[str] = field(default_factory=list)
    """Of the sections."""
    pictures: list[ElementTree.Element] = field(default_factory=list)
    """The drawings, ``<svg>`` elements."""
    photographs: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    """The words in the place of each picture."""

    def drawn(self) -> str:
        """Return every text of the drawings."""
        return "\n".join(" ".join(svg.itertext()) for svg in self.pictures)


def read_page(page: str) -> Page:
    """Read a report, and check all that holds for every report."""
    assert page.startswith("<!doctype html>") and '<meta charset="utf-8">' in page
    assert 'content="width=device-width, initial-scale=1"' in page  # or a phone shows it as wide as a desk's screen
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [], f"never closed: {reader.open}"
    assert reader.links <= reader.ids and len(reader.ids) == len(reader.page.titles) > 0
    return reader.page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _ALLOWED, f"<{tag}> is none of a report's elements"
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs) and not any(name.startswith("on") or name == "style" for name in found)
        if tag not in _VOID:
            self.open.append(tag)
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        for name in _ADDRESSES & found.keys():
            self._check_address(tag, name, found[name])
        if tag == "img":
            self.page.captions.append(found["alt"])

    def _check_address(self, tag: str, name: str, address: str) -> None:
        if (tag, name) == ("a", "href"):
            assert address.startswith("#")
            self.links.add(address[1:])
            return
        assert (tag, name) == ("img", "src")
        kind, _, content = address.partition(";base64,")
        data = base64.b64decode(content, validate=True)
        if kind == "data:image/svg+xml":
            self.page.pictures.append(_checked_svg(data))
        else:
            assert kind == "data:image/jpeg"
            self.page.photographs.append(Image.open(io.BytesIO(data)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where == "style":
            assert "url(" not in data and "@import" not in data
        elif data.strip():
            self.page.texts.append(data)
            if where == "h2":
                self.page.titles.append(data)

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def _checked_svg(data: bytes) -> ElementTree.Element:
    svg = ElementTree.fromstring(data)
    for element in svg.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a", "animate", "set")
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] == "href":
                assert value.startswith("#")
            assert not name.startswith("on")
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", value))
    return svg
