"""JSON files as numbered records: one object, a list of them, or a line each. A door; the readers use it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from outrider.errors import CallerError
from outrider.experts.adapters.npz import in_order

T = TypeVar("T")


def numbered(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where (file, line) and text of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield f"{path}, line {number}", line
    except OSError as error:
        raise CallerError(f"{path}: {error.strerror}. Name a file that can be read.") from error


def decoded(where: str, line: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CallerError(f"{where}: {error}. Is the line whole, and of this format?") from error


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where and object, over a file or a folder's `.json` and `.jsonl`. A line is forgotten once it is parsed."""
    decoder = msgspec.json.Decoder()
    for each in in_order(path, "*.jsonl", "*.json"):
        first = next(numbered(each), None)
        if first is None:
            raise CallerError(f"{each}: the file is empty. Name one with at least one record.")
        if first[1].lstrip()[:1] == b"{" and _complete(first[1]):
            found = ((where, decoded(where, line, decoder)) for where, line in numbered(each))
        else:
            whole = decoded(f"{each}", each.read_bytes(), decoder)
            items = whole if isinstance(whole, list) else [whole]
            found = ((f"{each}, record {i}", item) for i, item in enumerate(items, start=1))
        for where, record in found:
            if not isinstance(record, dict):
                raise CallerError(f"{where}: a {type(record).__name__}, not an object. Give one answer a line.")
            yield where, record


def _complete(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except msgspec.DecodeError:
        return False
    return True
