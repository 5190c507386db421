"""Reads a report back: the JSON inside it, and every number it shows. For tests here and in e2e."""

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

from outrider.lab.report.numbers import Numbers, written

VOID = {"meta", "link", "br", "input", "hr", "img"}


@dataclass
class Shown:
    """One <data> element: what it says, and where it says that this comes from."""

    attributes: dict[str, str]
    text: str = ""


class Markup(HTMLParser):
    """Text by element, numbers, scripts by id; `errors` where tags do not pair up."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shown: list[Shown] = []
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.errors: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(page)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag, _ in self._open if tag not in {"html", "body"}]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes))
        if tag == "data":
            self.shown.append(Shown(attributes))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.errors.append(f"</{tag}> closes {self._open[-1][0] if self._open else 'nothing'} at {self.getpos()}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside, attributes = self._open[-1] if self._open else ("", {})
        if inside == "script":
            self.scripts[attributes.get("id", "code")] = data
        elif inside != "style":
            self.text.append(data)
            if inside == "data":
                self.shown[-1].text += data

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.scripts["document"])
        return document

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def held_against_its_json(markup: Markup) -> int:
    """Check every number shown against the JSON inside the page; how many there were."""
    numbers = Numbers(markup.document)
    for one in markup.shown:
        value = numbers.at(one.attributes["data-key"])
        assert isinstance(value, int | float), one
        if "data-over" in one.attributes:
            value /= numbers.at(one.attributes["data-over"])
        assert float(one.attributes["value"]) == value, one
        assert one.text == written(value, one.attributes["data-form"]), one
    return len(markup.shown)
