"""Memory's whole interface between deciding and doing: every event and every command. Pure data.

event       emitted by                          when, how often
Recovered   move, from the disk tier's index    once, first, when a disk tier exists
Leased      server, a client's `lease`          once a request; answered by Grant at `by_s` at latest
Released    server, end of a lease              once a Grant
Prepared    server, a client's `prepare`        once a save; answered by Offer at once
Completed   server, a client's `complete`       once an Offer or part of it; Acknowledge, at once or when durable
Abandoned   server, a client's `abandon`        instead of Completed
Remembered  server, a client's `remember`       once a request, at its end: names its chain of blocks
Wanted      server, a client's `want`           a few a request; replaces the want of the same item
Withdrawn   server, a client's `withdraw`       once a path whose workflow ended
Flushed     server, a client's `flush`          seldom; Acknowledge when all that was published is durable
Left        server, end of a connection         once a client, whatever ended it
Copied      move, copies that ended well        once a batch of a Load, Save or Prefetch
CopyFailed  move, a copy that did not           once a copy: checksum, stale, short, budget, or an errno's name
Woke        server, a timer that Wake set       once a Wake that was not replaced by a later one

command      carried out by move (answers: by the server)
Grant        answer to Leased: where each block lies in the host arena, None where there is none. `lay` counts those
             there are by tier, as they lay when they were asked for: summed over a journal, the hits by tier
Offer        answer to Prepared: where to write each block, None where nothing is to be written
Acknowledge  answer to Completed, Abandoned, Flushed; `failed` names blocks that could not be made durable
Refuse       answer to a request that breaks the rules; `request` 0: the client is cut off
Load         `src` -> host, verified on arrival; `src` is a tier below host: hybrid, disk
Save         `src` -> `dst`, a tier below it. To disk: data, barrier, index record, barrier. From hybrid: verified first
Erase        these blocks leave `place`, a tier below host: the disk forgets them in its index
Prefetch     hybrid -> the hybrid device's own cache, ahead of a Load; pinned there until Unpin where `pin` says so
Unpin        these bytes of the hybrid tier need not stay in the device's cache
Wake         send Woke at `at_s`; replaces the Wake before

Each copy of a Load, Save or Prefetch ends once, in Copied or CopyFailed. Blocks are named by their key in hex (`item`),
clients by a number, requests by the client's own number.
"""

import msgspec

from outrider.wants import Want


class Found(msgspec.Struct, frozen=True, array_like=True):
    """A block that the disk tier's index holds."""

    item: str
    at: int
    size_bytes: int
    checksum: int
    generation: int


class Recovered(msgspec.Struct, frozen=True, tag=True):
    blocks: tuple[Found, ...]


class Leased(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    items: tuple[str, ...]
    by_s: float


class Released(msgspec.Struct, frozen=True, tag=True):
    client: int
    lease: int


class Prepared(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    items: tuple[str, ...]
    size_bytes: int


class Completed(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    items: tuple[str, ...]
    checksums: tuple[int, ...]
    durable: bool


class Abandoned(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    items: tuple[str, ...]


class Remembered(msgspec.Struct, frozen=True, tag=True):
    path: str
    items: tuple[str, ...]


class Wanted(msgspec.Struct, frozen=True, tag=True):
    want: Want


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    item: str


class Flushed(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int


class Left(msgspec.Struct, frozen=True, tag=True):
    client: int


class Copied(msgspec.Struct, frozen=True, tag=True):
    copies: tuple[int, ...]


class CopyFailed(msgspec.Struct, frozen=True, tag=True):
    copy: int
    reason: str


class Woke(msgspec.Struct, frozen=True, tag=True):
    pass


Event = (
    Recovered | Leased | Released | Prepared | Completed | Abandoned | Remembered | Wanted | Withdrawn | Flushed | Left
    | Copied | CopyFailed | Woke
)  # fmt: skip


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of the host arena, in Unpin of the hybrid tier: [at, at + size_bytes)."""

    at: int
    size_bytes: int


class Copy(msgspec.Struct, frozen=True):
    """One copy of one block between the tiers; `number` is what its ending is reported under.

    Of a Prefetch, `src_at` is the block's place in the hybrid tier; `dst_at` only counts bytes of the device's cache.
    """

    number: int
    item: str
    size_bytes: int
    src_at: int
    dst_at: int
    checksum: int
    generation: int


class Grant(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    spans: tuple[Span | None, ...]
    lay: dict[str, int] = {}


class Offer(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    spans: tuple[Span | None, ...]


class Acknowledge(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    failed: tuple[str, ...] = ()


class Refuse(msgspec.Struct, frozen=True, tag=True):
    client: int
    request: int
    why: str


class Load(msgspec.Struct, frozen=True, tag=True):
    copies: tuple[Copy, ...]
    src: str = "disk"


class Save(msgspec.Struct, frozen=True, tag=True):
    copies: tuple[Copy, ...]
    src: str = "host"
    dst: str = "disk"


class Erase(msgspec.Struct, frozen=True, tag=True):
    items: tuple[str, ...]
    place: str = "disk"


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    copies: tuple[Copy, ...]
    pin: bool


class Unpin(msgspec.Struct, frozen=True, tag=True):
    spans: tuple[Span, ...]


class Wake(msgspec.Struct, frozen=True, tag=True):
    at_s: float


Command = Grant | Offer | Acknowledge | Refuse | Load | Save | Erase | Prefetch | Unpin | Wake
