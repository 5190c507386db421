"""One JSONL line per (now, event, commands): golden plan, bug report, replay input and source of metrics in one.

    NAME.jsonl    line 1: {"journal": 1, "policy": "memory", "rank": 0, "settings": {...}, "outrider": "0.1.0"}
                  then:   {"now": 1.5, "event": {...}, "commands": [...]}
    NAME.arrays   sidecar directory; a numpy array enters the line as {"array": NAME, "digest": HEX}

One journal per policy object and rank. Each line is flushed before any command is carried out, never fsynced: a
crash of the process loses nothing, a crash of the machine may lose the tail, and a torn last line is ignored.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

import outrider
from outrider.errors import CallerError

FORMAT = 1
LOG = logging.getLogger("outrider.journal")
T = TypeVar("T")


class Policy(Protocol):
    """What the three systems' policies have in common: one door."""

    def handle(self, event: Any, now: float) -> Sequence[Any]: ...


class Header(msgspec.Struct, frozen=True):
    """First line of a journal: enough to build a fresh policy object."""

    policy: str
    rank: int
    settings: msgspec.Raw
    outrider: str
    journal: int = FORMAT


class Line(msgspec.Struct, frozen=True):
    """One line as read back: `event` and `commands` are the exact bytes that were written."""

    now: float
    event: msgspec.Raw
    commands: msgspec.Raw


class Journal:
    """Writes what one policy object saw and said. `path` is NAME.jsonl; its parent directory must exist."""

    def __init__(self, path: Path, policy: str, settings: msgspec.Struct, rank: int = 0) -> None:
        self.path = path
        self._arrays = path.with_suffix(".arrays")
        self._encoder = msgspec.json.Encoder(enc_hook=self._put_array)
        self._file: FileIO | None = None
        raw = msgspec.Raw(self._encoder.encode(settings))
        try:
            _set_aside(path)
            self._file = FileIO(path, "x")
            self._append(self._encoder.encode(Header(policy, rank, raw, outrider.__version__)))
        except OSError as error:
            raise CallerError(
                f"journal {path}: {error.strerror}. Name a directory that exists, is writable and has room."
            ) from error

    def write(self, now: float, event: Any, commands: Sequence[Any]) -> None:
        """Append one line; call it after `handle` and before any command is carried out.

        Where the line cannot be written (a full disk), the journal ends with the line before, says so once, and the
        work goes on without it.
        """
        if self._file is None:
            return
        try:
            self._append(self._encoder.encode({"now": now, "event": event, "commands": list(commands)}))
        except OSError as error:
            LOG.error("journal %s: %s. It ends here, the work goes on; free some room.", self.path, error.strerror)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        """The whole line or, where that fails, nothing of it."""
        assert self._file is not None
        begin, rest = self._file.tell(), memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device that cannot be cut; the torn tail is ignored when read
                self._file.truncate(begin)
            raise

    def _put_array(self, value: object) -> dict[str, str]:
        """Store an array once, under the name of its content; never a half-written one under that name."""
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a journal cannot hold {type(value).__name__}")
        digest = array_digest(value)
        self._arrays.mkdir(exist_ok=True)
        target = self._arrays / f"{digest}.npy"
        if not target.exists():
            draft = target.with_suffix(".draft")
            with draft.open("wb") as file:
                np.save(file, value, allow_pickle=False)
            draft.replace(target)
        return {"array": target.name, "digest": digest}


def _set_aside(path: Path) -> None:
    """A journal that is there tells of an earlier run, perhaps of its crash: it becomes NAME.1.jsonl, NAME.2.jsonl."""
    if not path.exists():
        return
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.jsonl").exists())
    path.rename(path.with_suffix(f".{number}.jsonl"))
    if path.with_suffix(".arrays").exists():
        path.with_suffix(".arrays").rename(path.with_suffix(f".{number}.arrays"))


def array_digest(array: "np.ndarray[Any, Any]") -> str:
    """Digest of shape, dtype and content: equal on every rank that holds the same numbers."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return blake2b(head + np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def read(path: Path) -> tuple[Header, Iterator[Line]]:
    """The header and then, lazily, the whole lines of a journal. CallerError where it is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CallerError(f"journal {path}: {error.strerror}. Name a NAME.jsonl file that a run wrote.") from error
    whole = data.split(b"\n")[:-1]  # a torn last line was never acknowledged
    try:
        header = msgspec.json.decode(whole[0] if whole else b"", type=Header)
    except msgspec.DecodeError as error:
        raise CallerError(f"journal {path}: line 1 is no journal header ({error}). Name a NAME.jsonl file.") from error
    if header.journal != FORMAT:
        raise CallerError(
            f"journal {path}: format {header.journal}, this Outrider reads {FORMAT}. Use outrider {header.outrider}."
        )
    return header, _lines(path, whole[1:])


def _lines(path: Path, whole: Sequence[bytes]) -> Iterator[Line]:
    for number, line in enumerate(whole, start=2):
        try:
            yield msgspec.json.decode(line, type=Line)
        except msgspec.DecodeError as error:
            raise CallerError(f"journal {path}: line {number} is damaged ({error}). Restore the file.") from error


def told(path: Path, events: Any, commands: Any) -> Iterator[tuple[float, Any, list[Any]]]:
    """Every whole line as (now, event, commands), arrays from the sidecar included; lazily, after the header.

    events, commands  the union types of the policy's events and commands
    Raises CallerError where it is no journal, an array is missing or another one, or a line is of another version.
    """
    header, lines = read(path)
    event_of, commands_of = (
        _decoder(path, header, events, "event"),
        _decoder(path, header, list[commands], "command"),
    )
    return (
        (line.now, event_of(number, line.event), commands_of(number, line.commands))
        for number, line in enumerate(lines, start=2)
    )


def settings(path: Path, wanted: type[T]) -> T:
    """The settings in the header, as what the policy takes. CallerError where this version takes others."""
    header, _ = read(path)
    found: T = _decoder(path, header, wanted, "setting")(1, header.settings)
    return found


def _decoder(path: Path, header: Header, wanted: Any, what: str) -> Callable[[int, msgspec.Raw], Any]:
    """Reads `wanted` out of a part of a line, given the line's number; `what` names it to a person."""
    arrays = path.with_suffix(".arrays")

    def get_array(wanted: type, value: Any) -> Any:
        if wanted is not np.ndarray:
            raise TypeError(f"a journal cannot hold {wanted.__name__}")
        try:
            array = np.load(arrays / value["array"], allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CallerError(f"journal {path}: {value['array']}: {error}. Restore the sidecar {arrays}.") from error
        if array_digest(array) != value["digest"]:
            raise CallerError(
                f"journal {path}: {value['array']} is not the array that was written. Restore the sidecar."
            )
        return array

    decode = msgspec.json.Decoder(wanted, dec_hook=get_array).decode

    def decoded(number: int, raw: msgspec.Raw) -> Any:
        try:
            return decode(raw)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, CallerError):
                raise error.__cause__ from None
            raise CallerError(
                f"journal {path}: line {number}: this version knows no such {what} ({error}). "
                f"Use outrider {header.outrider}."
            ) from error

    return decoded


class Difference(msgspec.Struct, frozen=True):
    """The first line whose commands differ; `line` counts from 1 as an editor does."""

    line: int
    event: str
    recorded: str
    replayed: str


def replay(
    path: Path, events: Any, fresh: Callable[[msgspec.Raw], Policy], lines: Iterator[Line] | None = None
) -> tuple[int, Difference | None]:
    """Run a journal through a fresh policy object; how many lines agreed, and the first that differs.

    events  the union type of the policy's events
    fresh   builds the policy object from the header's raw settings
    """
    header, recorded = read(path)
    policy = fresh(header.settings)
    digests = msgspec.json.Encoder(enc_hook=lambda array: {"array": f"{(d := array_digest(array))}.npy", "digest": d})
    event_of = _decoder(path, header, events, "event")
    agreed = 0
    for number, line in enumerate(lines or recorded, start=2):
        event = event_of(number, line.event)
        again = digests.encode(list(policy.handle(event, line.now)))
        if again != bytes(line.commands):
            return agreed, Difference(number, bytes(line.event).decode(), bytes(line.commands).decode(), again.decode())
        agreed += 1
    return agreed, None
