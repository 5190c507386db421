"""The numbers of the page: each is a <data> element that names where it lies in the JSON inside the page.

Pure. Called by `sections.py` and by the template; a test reads the page back and holds each number against the JSON.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from markupsafe import Markup, escape

from outrider.lab.demo import table

FORMATS: Mapping[str, Callable[[float], str]] = MappingProxyType({
    "seconds": lambda value: table.seconds(value) if value < 1000 else f"{value:,.0f} s",
    "count": table.count,
    "mib": table.mib,
    "ratio": lambda value: f"{value:.2f}",
    "load": lambda value: f"{value:.3f}",
    "percent": lambda value: f"{100 * value:.0f} %",
    "tokens": lambda value: f"{value:.1f}",
    "error": lambda value: f"{100 * value:+.1f} %",
    "tiny": lambda value: f"{value:.1e}",
})  # fmt: skip


class Numbers:
    """The JSON of the page, and the only way to show a number of it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document

    def at(self, key: str) -> Any:
        """What lies at a path of names and list positions, joined by dots; None where nothing does."""
        found: Any = self.document
        for name in key.split("."):
            if isinstance(found, list):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                return None
        return found

    def show(self, key: str, form: str) -> Markup:
        """The number at `key`, as text that knows where it came from."""
        value = self.at(key)
        element = '<data value="{}" data-key="{}" data-form="{}">{}</data>'
        return Markup(element).format(value, key, form, written(value, form))

    def over(self, key: str, other: str, form: str = "ratio") -> Markup:
        """The number at `key` over that at `other`; a dash where there is nothing to divide by."""
        if not self.at(other):
            return escape("–")
        value = self.at(key) / self.at(other)
        element = '<data value="{}" data-key="{}" data-over="{}" data-form="{}">{}</data>'
        return Markup(element).format(value, key, other, form, written(value, form))


def written(value: float, form: str) -> str:
    """As FORMATS has it, never broken between number and unit."""
    return FORMATS[form](value).replace(" ", "\N{NO-BREAK SPACE}")
