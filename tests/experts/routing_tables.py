"""Random routing tables for the tests of foresight and its readers."""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from outrider.experts.routing import Routing


@st.composite
def routings(draw: st.DrawFn, gaps: bool = True) -> Routing:
    """Distinct ids in a row, some rows missing, some tokens unknown; no layer that repeats one id everywhere."""
    layers, top_k = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    experts = draw(st.sampled_from([5, 64, 128, 129, 256, 300]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda some: sum(some) > 0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = sum(lengths)
    routes = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    if gaps:
        routes[rng.random((tokens, layers)) < draw(st.sampled_from([0, 0.3]))] = -1
        routes[rng.random(tokens) < draw(st.sampled_from([0, 0.3]))] = -1
        routes[0] = np.arange(top_k)  # at least one is known
    return Routing.of(routes, np.cumsum([0, *lengths]), experts=experts)


def plain_counts(routing: Routing, edges: Any, ranks: int, twice: bool = False) -> Any:
    """Counted token by token in plain Python."""
    counts = np.zeros((len(edges) - 1, routing.layers, ranks, routing.experts), dtype=int)
    for m, (start, end) in enumerate(pairwise(edges.tolist())):
        runs = np.array_split(np.arange(start, end), ranks)
        for rank, run in enumerate(runs):
            for token in run.tolist():
                for layer, ids in enumerate(routing.routes_TLK[token].tolist()):
                    if routing.known()[token] and min(ids) >= 0:
                        for e in ids if twice else set(ids):
                            counts[m, layer, rank, e] += 1
    return counts
