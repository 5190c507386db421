"""One JSONL line per (now, event, commands): golden plan, bug report, replay input and source of metrics in one.

    NAME.jsonl    line 1: {"journal": 1, "policy": "memory", "rank": 0, "settings": {...}, "outrider": "0.1.0"}
                  then:   {"now": 1.5, "event": {...}, "commands": [...]}
    NAME.arrays   sidecar directory; a numpy array enters the line as {"array": NAME, "digest": HEX}

One journal per policy object and rank. Each line is flushed before any command is carried out, never fsynced: a
crash of the process loses nothing, a crash of the machine may lose the tail, and a torn last line is ignored.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

import outrider
from outrider.errors import CallerError

FORMAT = 1


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
        raw = msgspec.Raw(self._encoder.encode(settings))
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise CallerError(
                f"journal {path}: {error.strerror}. Name a directory that exists and is writable."
            ) from error
        self._file.write(self._encoder.encode(Header(policy, rank, raw, outrider.__version__)) + b"\n")

    def write(self, now: float, event: Any, commands: Sequence[Any]) -> None:
        """Append one line; call it after `handle` and before any command is carried out."""
        line = {"now": now, "event": event, "commands": list(commands)}
        self._file.write(self._encoder.encode(line) + b"\n")

    def close(self) -> None:
        self._file.close()

    def _put_array(self, value: object) -> dict[str, str]:
        """Store an array once, under the name of its content."""
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a journal cannot hold {type(value).__name__}")
        digest = array_digest(value)
        self._arrays.mkdir(exist_ok=True)
        target = self._arrays / f"{digest}.npy"
        if not target.exists():
            np.save(target, value, allow_pickle=False)
        return {"array": target.name, "digest": digest}


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
    return header, (msgspec.json.decode(line, type=Line) for line in whole[1:])


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
    arrays = path.with_suffix(".arrays")

    def get_array(wanted: type, value: Any) -> Any:
        if wanted is not np.ndarray:
            raise TypeError(f"a journal cannot hold {wanted.__name__}")
        array = np.load(arrays / value["array"], allow_pickle=False)
        if array_digest(array) != value["digest"]:
            raise CallerError(
                f"journal {path}: {value['array']} is not the array that was written. Restore the sidecar."
            )
        return array

    digests = msgspec.json.Encoder(enc_hook=lambda array: {"array": f"{(d := array_digest(array))}.npy", "digest": d})
    decoder = msgspec.json.Decoder(events, dec_hook=get_array)
    agreed = 0
    for number, line in enumerate(lines or recorded, start=2):
        again = digests.encode(list(policy.handle(decoder.decode(line.event), line.now)))
        if again != bytes(line.commands):
            return agreed, Difference(number, bytes(line.event).decode(), bytes(line.commands).decode(), again.decode())
        agreed += 1
    return agreed, None
