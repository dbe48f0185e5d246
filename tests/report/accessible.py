"""What must hold of every page, read from its HTML; what only a browser can tell is in `make pages`."""

from collections import Counter
from html.parser import HTMLParser


class _Reader(HTMLParser):
    """Collects elements with their attributes, and the text of those with an identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values, tuple(name for name, _ in self._open)))
        if tag not in ("meta", "br", "img", "input", "link"):
            self._open.append((tag, values.get("id")))
            if values.get("id"):
                self.text[values["id"] or ""] = ""

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(name for name, _ in self._open)))

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.text[name] += data


def faults(page: str) -> list[str]:
    """What is wrong with a page: figures without a name or description, tables without scope or caption, …"""
    reader = _Reader()
    reader.feed(page)
    found: list[str] = []
    names = Counter(values["id"] for _, values, _ in reader.elements if values.get("id"))
    found += [f"identifier {name} {count} times" for name, count in names.items() if count > 1]
    for tag, values, inside in reader.elements:
        if tag == "svg":
            if values.get("role") != "img":
                found.append(f"figure without role: {values}")
            for attribute in ("aria-labelledby", "aria-describedby"):
                if not reader.text.get(values.get(attribute) or "", "").strip():
                    found.append(f"figure without {attribute}: {values}")
        if tag == "th" and values.get("scope") not in ("col", "row"):
            found.append(f"table heading without scope: {values}")
        if tag == "td" and "tbody" not in inside:
            found.append("a cell outside the body of its table")
        if values.get("class") == "scroll" and not (values.get("tabindex") == "0" and values.get("aria-label")):
            found.append(f"scrolls, but not by keyboard: {values}")
        for attribute in ("src", "href", "xlink:href"):
            if not (values.get(attribute) or "#").startswith("#"):
                found.append(f"loads or leads to {values[attribute]}")
    tables, captions = (sum(tag == name for tag, _, _ in reader.elements) for name in ("table", "caption"))
    if tables != captions:
        found.append(f"{tables} tables have {captions} captions")
    if not any(tag == "html" and values.get("lang") for tag, values, _ in reader.elements):
        found.append("no language")
    return found
