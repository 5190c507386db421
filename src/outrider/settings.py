"""Reads a TOML file into a system's settings struct; every mistake becomes one sentence with its line.

The only file that takes settings from environment variables. Options win over the file, the file over defaults.
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

TABLES = ("agents",)


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
            what = "table" if isinstance(value, dict) else "key"
            known = ", ".join(f"[{table}]" for table in TABLES)
            raise CallerError(f"config {path}{_line(text, '', name)}: unknown {what} {name!r}. Known tables: {known}.")
    return text, found


def _sentence(why: str, path: Path | None, text: str, table: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's complaint, with the line it is about and what to write instead."""
    unknown = re.search(r"unknown field `(\w+)`", why)
    at = re.search(r"`\$\.?([\w.]*)", why)
    inside = at.group(1).split(".") if at and at.group(1) else []
    key = unknown.group(1) if unknown else (inside.pop() if inside else "")
    header = ".".join([table, *inside])
    line = _line(text, header, key) if path else ""
    place = f"config {path}{line}" if line else "options"
    if unknown:
        known = _fields(kind, table)
        near = difflib.get_close_matches(key, [name for _, name in known], n=1)
        where = next((owner for owner, name in known if near and name == near[0]), "")
        here = ", ".join(name for owner, name in known if owner == header)
        hint = f"Did you mean {near[0]!r} in [{where}]?" if near else f"Known keys of [{header}]: {here}."
        return f"{place}: unknown key {key!r} in [{header}]. {hint}"
    wrong = why.split(" - at")[0]
    return f"{place}: {header}.{key or '?'}: {wrong}. Mend the value; docs/outrider.toml shows each with its unit."


def _fields(kind: type[msgspec.Struct], table: str) -> list[tuple[str, str]]:
    """(table, key) of every setting, nested tables below their own name."""
    names: list[tuple[str, str]] = []
    for field in msgspec.structs.fields(kind):
        names.append((table, field.name))
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            names += _fields(field.type, f"{table}.{field.name}")
    return names


def _line(text: str, header: str, key: str) -> str:
    """Where `key` stands below [header] (or, for header "", outside every table)."""
    current = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[([\w.]+)\]", line):
            current = table.group(1)
            if current == key and not header:
                return f" line {number}"
        elif current == header and re.match(rf"\s*{re.escape(key)}\s*=", line):
            return f" line {number}"
    return ""
