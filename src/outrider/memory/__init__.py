"""Tiered memory for KV blocks: content-addressed, shared between processes, moved before it is asked for.

    import outrider.memory as memory

    space = memory.KeySpace(model="weights-digest", dtype="float32", layout="demo", block_tokens=16)
    keys = space.chain(range(64))                                # four blocks of 16 tokens
    with memory.open("host=64MiB") as store:                     # or memory.connect("/run/outrider.sock")
        slots = store.prepare(keys, nbytes=4096)
        for slot in slots:
            slot.view[:] = bytes(4096)                           # in place: this is the shared memory itself
        store.complete(slots)
        with store.lease(keys[: store.lookup(keys)]) as lease:
            print(len(lease.views), lease.views[0].nbytes)       # 4 4096

`events.py` is the whole interface between deciding (`policy.py`) and doing (`move.py`): read it first.
"""

from outrider.memory.keys import KeySpace
from outrider.memory.store import Lease, Slot, Store, connect, open
from outrider.memory.tiers.spec import Tiers, parse_tiers

__all__ = ["KeySpace", "Lease", "Slot", "Store", "Tiers", "connect", "open", "parse_tiers"]
