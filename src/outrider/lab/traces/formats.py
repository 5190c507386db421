"""The trace formats by name: how each is told apart by its first line, and who reads it."""

import csv
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from outrider.errors import CallerError
from outrider.lab.traces import azure, chatdev, claude_code, journal, mooncake, tau2
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.source import Source


class Format(NamedTuple):
    """keys: names that the first line has, as members of a JSON object or as columns of a CSV header."""

    keys: tuple[str, ...]
    read: Callable[[Source, int | None], Draft]


FORMATS = {
    "claude-code": Format(claude_code.KEYS, claude_code.read),
    "chatdev": Format(chatdev.KEYS, chatdev.read),
    "tau2": Format(tau2.KEYS, tau2.read),
    "mooncake": Format(mooncake.KEYS, mooncake.read),
    "azure": Format(azure.COLUMNS, azure.read),
    "outrider": Format(journal.KEYS, journal.read),
}


def named(name: str) -> Format:
    """CallerError where there is no such format."""
    if name not in FORMATS:
        raise CallerError(f"format {name!r}: not known. Choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def recognise(source: Source) -> str:
    """The format's name, by the content of the first line. CallerError where it is none of them."""
    line = source.first()
    try:
        first = msgspec.json.decode(line)
        keys = set(first) if isinstance(first, dict) else set()
    except (msgspec.DecodeError, UnicodeDecodeError):
        keys = set(next(csv.reader([line.decode(errors="replace")]), ()))
    for name, known in FORMATS.items():
        if keys.issuperset(known.keys):
            return name
    raise CallerError(
        f"{source.path}: its first line is of no known trace format ({', '.join(FORMATS)}). "
        "Name another file, or the format with --format."
    )
