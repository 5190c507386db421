"""A digest of a model's weights: the same content, the same KV blocks. A model's name or path is no content.

Reads every weight file once, at the speed of the disk; what a file's digest was is kept under $XDG_CACHE_HOME/outrider
by path, inode, size and time of change, so that the next start reads nothing. Called by the connector at its start.
"""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import xxhash

from outrider.errors import CallerError

KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
READ_BYTES = 1 << 22
READERS = 8
DIGEST_DIGITS = 32


def digest(folder: Path, cache: Path) -> str:
    """Of all weight files under `folder`, by name, and config.json. CallerError where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())
    if not files:
        raise CallerError(
            f"Outrider's connector: no weights ({', '.join(KINDS)}) under {folder}, so that nothing tells whose KV "
            f'blocks these are. Give their digest: "weights" in kv_connector_extra_config.'
        )
    files += [path for path in [folder / "config.json"] if path.is_file()]
    with ThreadPoolExecutor(READERS) as readers:
        parts = list(readers.map(lambda path: _kept(path, cache), files))
    total = blake2b(digest_size=16)
    for path, part in zip(files, parts, strict=True):
        total.update(f"{path.relative_to(folder)}\0{part}\0".encode())
    return total.hexdigest()


def folder_of(model: str, revision: str | None) -> Path:
    """Where a model's files lie: a directory of that name, or its snapshot in the hub's cache. CallerError else."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache  # there with every engine that loads from a hub

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(config, str):
        return Path(config).parent
    raise CallerError(
        f"Outrider's connector: model {model} is no directory here and not in the hub's cache, so that its weights "
        f'cannot be read. Name its directory, or give a digest: "weights" in kv_connector_extra_config.'
    )


def _kept(path: Path, cache: Path) -> str:
    """A file's digest, from the cache where the file did not change since."""
    real = path.resolve()
    state = real.stat()
    name = f"{real}\0{state.st_ino}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}"
    note = cache / blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    try:
        kept = note.read_bytes()
    except OSError:
        kept = b""
    if len(kept) == DIGEST_DIGITS:
        return kept.decode("ascii", "replace")
    found = _read(real)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as aside:
            aside.write(found)
        os.replace(aside.name, note)
    except OSError:
        return found  # no cache: it is read again at the next start
    return found


def _read(path: Path) -> str:
    total = xxhash.xxh3_128()
    for piece in _pieces(path):
        total.update(piece)
    return total.hexdigest()


def _pieces(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]
