"""HTML pages as a strict parser reads them."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "input"}


class ParsedPage(HTMLParser):
    """Fails on tags that are not closed in their order.

    `open` are tags that were never closed, `text` pieces of text, `attributes` (tag, name, value).
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.feed(page)

    @property
    def words(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.text).split())

    @property
    def loaded(self) -> list[str]:
        """What a browser could load, or go to."""
        names = ("src", "href", "srcset", "data", "action")
        return [value for _, name, value in self.attributes if name in names]

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
