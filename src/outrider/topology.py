"""Where things can be, and what joins those places. Pure data: the first file to read, with `wants.py`.

A `Place` holds items up to a capacity; a `Link` carries bytes between two places. Both are plain values: what is
free and what is booked at this moment is kept by `ledger.py`.
"""

import msgspec


class Place(msgspec.Struct, frozen=True):
    """Somewhere an item can be: `hbm:0`, `host`, `hybrid`, `disk`, `remote:pool`."""

    name: str
    capacity_bytes: int


class Link(msgspec.Struct, frozen=True):
    """A one-way path from place `src` to place `dst`. `slots` moves at most are in flight on it at once."""

    src: str
    dst: str
    bandwidth: float  # bytes/s
    latency_s: float = 0.0
    slots: int = 1

    def hop_s(self, size_bytes: int) -> float:
        """Seconds that one move of `size_bytes` occupies this link: latency + size / bandwidth."""
        return self.latency_s + size_bytes / self.bandwidth


class Topology(msgspec.Struct, frozen=True):
    """All places and links that one policy object knows."""

    places: tuple[Place, ...]
    links: tuple[Link, ...] = ()

    def place(self, name: str) -> Place:
        """The place called `name`; KeyError, naming the known ones, when there is none."""
        for place in self.places:
            if place.name == name:
                return place
        raise KeyError(f"no place {name!r}; known: {', '.join(p.name for p in self.places)}")

    def link(self, src: str, dst: str) -> Link | None:
        """The link from `src` to `dst`, or None where no bytes can go directly."""
        for link in self.links:
            if (link.src, link.dst) == (src, dst):
                return link
        return None
