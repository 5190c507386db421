"""What the scheduler's half tells the worker's half, once a step. Pure data; pickled on its way."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Copies:
    """Blocks to load into, or save from, the engine's KV cache: key i belongs to block i."""

    request: str
    keys: tuple[bytes, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Orders:
    """One step's work.

    loads, saves  in order; a save may read its blocks as soon as the step's forward pass is over
    freed         requests whose blocks are about to be overwritten: their saves end now
    held          requests that ended, whose blocks wait until their saves are over
    """

    loads: tuple[Copies, ...] = ()
    saves: tuple[Copies, ...] = ()
    freed: frozenset[str] = frozenset()
    held: tuple[str, ...] = ()
