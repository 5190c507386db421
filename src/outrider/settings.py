"""Reads a TOML file into a system's settings struct; every mistake becomes one sentence with its line.

The only file that reads environment variables. Command-line options win over the file, the file over defaults.
"""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from outrider.errors import CallerError

T = TypeVar("T", bound=msgspec.Struct)

TABLES = ("agents", "memory")


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/outrider, else ~/.cache/outrider."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


def read(path: Path | None, table: str, kind: type[T], overrides: dict[str, Any]) -> T:
    """The settings of one system: `table` of the TOML file, overridden by every option that is not None.

    path  None: no file, defaults and overrides alone
    Raises CallerError: no such file, broken TOML, an unknown table or key (with the nearest known one), a bad value.
    """
    text, found = ("", {}) if path is None else _parse(path)
    values = {**found.get(table, {}), **{key: value for key, value in overrides.items() if value is not None}}
    try:
        return msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as error:
        raise CallerError(_sentence(str(error), path, text, table, kind)) from error


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text()
        found = tomllib.loads(text)
    except OSError as error:
        raise CallerError(
            f"config {path}: {error.strerror}. Name a TOML file that exists; docs/outrider.toml is an example."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallerError(
            f"config {path}: broken TOML: {error}. Mend that line; docs/outrider.toml is an example."
        ) from error
    for name, value in found.items():
        if name not in TABLES or not isinstance(value, dict):
            raise CallerError(
                f"config {path}{_line(text, name)}: unknown {'table' if isinstance(value, dict) else 'key'} {name!r}. "
                f"Known tables: {', '.join(f'[{t}]' for t in TABLES)}."
            )
    return text, found


def _sentence(why: str, path: Path | None, text: str, table: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's complaint, with the line it is about and what to write instead."""
    unknown = re.search(r"unknown field `(\w+)`", why)
    at = re.search(r"\$\.([\w.]+)", why)
    key = unknown.group(1) if unknown else (at.group(1).split(".")[-1] if at else "")
    place = f"config {path}{_line(text, key)}" if path and _line(text, key) else "options"
    if unknown:
        known = _fields(kind)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys of [{table}]: {', '.join(known)}."
        return f"{place}: unknown key {key!r} in [{table}]. {hint}"
    wrong = why.split(" - at")[0]
    return f"{place}: {table}.{key or '?'}: {wrong}. Mend the value; docs/outrider.toml shows each with its unit."


def _fields(kind: type[msgspec.Struct]) -> list[str]:
    names: list[str] = []
    for field in msgspec.structs.fields(kind):
        names.append(field.name)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            names += _fields(field.type)
    return names


def _line(text: str, key: str) -> str:
    for number, line in enumerate(text.splitlines(), start=1):
        if key and re.match(rf"\s*\[?[\w.]*\b{re.escape(key)}\b", line):
            return f" line {number}"
    return ""
