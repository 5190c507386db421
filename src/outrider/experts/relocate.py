"""New homes at the step boundary, where optimizer state may travel: fewer micro-steps' maxima above the mean. Pure.

Two experts of different domains (nodes, or ranks where there is one node) change places, the best such exchange first,
as long as it takes at least `hysteresis` of the mean domain load off the sum over micro-steps of the fullest domain.
Homes that are good stay, so that a step much like the last moves nothing. An exchange keeps the number of experts on
every rank. Source: local search for balanced partition; the sum of maxima is what a step waits for.
"""

import numpy as np
from numba import njit

from outrider.experts.events import Array

HYSTERESIS = 0.02


@njit(cache=True)
def relocate(load_ME: Array, homes_E: Array, domains_R: Array, hysteresis: float) -> Array:
    """homes_E after the exchanges. load_ME: token-slots of each micro-step and expert; domains_R: domain of each rank.

    Deterministic: the largest gain, then the lowest experts.
    """
    steps, experts = load_ME.shape
    homes_E = homes_E.copy()
    domains = domains_R.max() + 1
    load_MD = np.zeros((steps, domains), dtype=np.int64)
    for m in range(steps):
        for e in range(experts):
            load_MD[m, domains_R[homes_E[e]]] += load_ME[m, e]
    enough = hysteresis * load_ME.sum() / domains / max(steps, 1)
    waits_D = np.zeros(domains, dtype=np.int64)
    for _ in range(experts):
        waits_D[:] = 0
        for m in range(steps):
            waits_D[np.argmax(load_MD[m])] += load_MD[m].max()
        hot = np.argmax(waits_D)
        best_gain, best_a, best_b = enough, -1, -1
        for a in range(experts):
            if domains_R[homes_E[a]] != hot:
                continue
            for b in range(experts):
                other = domains_R[homes_E[b]]
                if other == hot:
                    continue
                gain = 0
                for m in range(steps):
                    delta = load_ME[m, a] - load_ME[m, b]
                    before, after = 0, 0
                    for d in range(domains):
                        load = load_MD[m, d]
                        before = max(before, load)
                        if d == hot:
                            load -= delta
                        elif d == other:
                            load += delta
                        after = max(after, load)
                    gain += before - after
                if gain > best_gain:
                    best_gain, best_a, best_b = gain, a, b
        if best_a < 0:
            return homes_E
        other = domains_R[homes_E[best_b]]
        for m in range(steps):
            delta = load_ME[m, best_a] - load_ME[m, best_b]
            load_MD[m, hot] -= delta
            load_MD[m, other] += delta
        homes_E[best_a], homes_E[best_b] = homes_E[best_b], homes_E[best_a]
    return homes_E
