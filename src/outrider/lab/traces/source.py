"""A trace file, plain or xz, as numbered lines. A door: it reads files; nothing is kept of a line once it is parsed.

What is wrong with a file is said in one sentence with the line number, counted from 1 as an editor does.
"""

import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from outrider.errors import CallerError

XZ = b"\xfd7zXZ\x00"
Progress = Callable[[int, int], None]  # bytes of the file read so far, and all of them
T = TypeVar("T")


def silent(read_bytes: int, total_bytes: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Source:
    """One trace file. `lines` may be called several times, each reads from the start."""

    path: Path
    progress: Progress = silent

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number and line, blank ones left out. CallerError where the file cannot be read to its end."""
        try:
            with self.path.open("rb") as raw:
                total_bytes = self.path.stat().st_size
                packed = raw.peek(len(XZ)).startswith(XZ)
                at_bytes = 0
                with lzma.open(raw) if packed else raw as file:
                    for number, line in enumerate(file, start=1):
                        if raw.tell() != at_bytes:
                            at_bytes = raw.tell()
                            self.progress(at_bytes, total_bytes)
                        if not line.isspace():
                            yield number, line
                self.progress(total_bytes, total_bytes)
        except (EOFError, lzma.LZMAError) as error:
            raise CallerError(f"{self.path}: the xz data is damaged or cut short ({error}). Fetch it again.") from error
        except OSError as error:
            raise CallerError(f"{self.path}: {error.strerror}. Name a trace file that can be read.") from error

    def first(self) -> bytes:
        """The first line that is not blank. CallerError where there is none."""
        for _, line in Source(self.path).lines():
            return line
        raise CallerError(f"{self.path}: the file is empty. Name a trace with at least one line.")

    def decode(self, number: int, line: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
        """The line as the decoder's type."""
        try:
            return decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.fault(number, str(error)) from error

    def fault(self, number: int, what: str) -> CallerError:
        """What to raise for a malformed line."""
        return CallerError(f"{self.path}: line {number}: {what}. Mend the line, or name its format with --format.")
