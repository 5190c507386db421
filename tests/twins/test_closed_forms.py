"""The simulator's clock and engine against queueing theory: mean response times within 1 %.

A job of the theory is a request with a prompt of one token; its service is its output tokens times a fixed time, so
that service is exactly geometric or two-valued and its moments are known. Arrivals are Poisson, all is seeded.

A plain mean over a hundred thousand jobs still errs by 1 %, since the sample's own load differs from the true one. So
what is known exactly serves as a control variate: means of service and gaps, and, for sharing and SRPT, the work that
each job finds, which is the same under every order that never idles (its mean is Pollaczek's and Khinchine's, its
sample Lindley's). What is left is under 0.35 %, estimated from batches and asserted.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from outrider.lab.clock import Clock
from outrider.lab.limits.order import shortest_remaining
from outrider.lab.twins.engine import Engine
from outrider.lab.twins.job import Job, Order, by_arrival
from outrider.lab.twins.pool import Pool
from outrider.lab.twins.speed import Speed

BATCHES, WARM = 100, 2_000
TOKEN_S = 0.001
MEAN_TOKENS = 400
LOAD = 0.5
RATE = LOAD / (MEAN_TOKENS * TOKEN_S)  # arrivals a second
ENDLESS = 10**9
pytestmark = pytest.mark.slow
Sizes = Callable[[np.random.Generator, int], NDArray[np.int64]]
NO_CHAIN = np.zeros(0, np.int64)


def geometric(random: np.random.Generator, count: int) -> NDArray[np.int64]:
    return random.geometric(1 / MEAN_TOKENS, count)


def two_valued(random: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Many short, few long: squared coefficient of variation 3.6. Mean 400."""
    return np.where(random.random(count) < 0.9, 145, 2695)


def moments(sizes: Sizes) -> tuple[float, float]:
    """Exact mean and second moment of a service time in seconds."""
    if sizes is geometric:
        share = 1 / MEAN_TOKENS
        return MEAN_TOKENS * TOKEN_S, (2 - share) / share**2 * TOKEN_S**2
    return 400 * TOKEN_S, (0.9 * 145**2 + 0.1 * 2695**2) * TOKEN_S**2


def responses(sizes: Sizes, jobs: int, seats: int, batch: int, order: Order) -> NDArray[np.float64]:
    """Rows (response, service, gap before it) in seconds, one a job, by arrival."""
    random = np.random.default_rng(7)
    tokens, gaps = sizes(random, jobs), random.exponential(1 / RATE, jobs)
    arrivals, ended = np.cumsum(gaps), np.zeros(jobs)
    clock = Clock()
    engine = Engine(clock, Speed(0.0, 0.0, TOKEN_S), Pool(ENDLESS, 0), 16, batch, seats, order)

    def arrive(number: int) -> None:
        def finished() -> None:
            ended[number] = clock.now

        job = Job(str(number), 1, int(tokens[number]), NO_CHAIN, lambda: None, finished, lambda kind, why: None)
        engine.submit(job)
        if number + 1 < jobs:
            clock.at(arrivals[number + 1], lambda: arrive(number + 1))

    clock.at(arrivals[0], lambda: arrive(0))
    clock.run()
    assert engine.computed_tokens == tokens.sum(), "work is conserved"
    assert engine.busy_s == pytest.approx(tokens.sum() * TOKEN_S)
    return np.stack([ended - arrivals, tokens * TOKEN_S, gaps], axis=1)


def found_s(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lindley: the seconds of work that each job finds."""
    walk = np.concatenate([[0.0], np.cumsum(rows[:-1, 1] - rows[1:, 2])])
    return walk - np.minimum.accumulate(walk)


def controlled_mean(rows: NDArray[np.float64], sizes: Sizes, with_work: bool) -> tuple[float, float]:
    """Mean response corrected by what is known, and its standard error, from batch means."""
    service_s, second = moments(sizes)
    known = np.array([service_s, 1 / RATE, second, RATE * second / (2 * (1 - LOAD))])
    wide = np.column_stack([rows, rows[:, 1] ** 2, found_s(rows)])[WARM:]
    controls = 4 if with_work else 3
    batches = wide[: len(wide) // BATCHES * BATCHES].reshape(BATCHES, -1, 5).mean(axis=1)
    design = np.column_stack([np.ones(BATCHES), (batches[:, 1:] - known)[:, :controls]])
    fit, *_ = np.linalg.lstsq(design, batches[:, 0], rcond=None)
    residual = batches[:, 0] - design @ fit
    return float(fit[0]), float(residual.std() / math.sqrt(BATCHES - controls - 1))


def fcfs_s(sizes: Sizes) -> float:
    """Pollaczek-Khinchine; for exponential service it is 1 / (mu - lambda)."""
    mean_s, second = moments(sizes)
    return mean_s + RATE * second / (2 * (1 - LOAD))


def sharing_s(sizes: Sizes) -> float:
    """M/G/1 processor sharing: insensitive to everything but the mean."""
    mean_s, _ = moments(sizes)
    return mean_s / (1 - LOAD)


def srpt_s(sizes: Sizes) -> float:
    """Schrage and Miller 1966, on the lattice of service times.

    E[T(x)] = rate (E[S^2; S <= x] + x^2 P(S > x)) / (2 (1 - rho(x)) (1 - rho(x-))) + integral from 0 to x of
    dt / (1 - rho(t)), with rho(x) = rate E[S; S <= x]. Of jobs of one size the earlier goes first, hence rho(x-), the
    load of what is strictly smaller, in one of the factors.
    """
    if sizes is geometric:
        x = np.arange(1, 20 * MEAN_TOKENS)
        mass = (1 / MEAN_TOKENS) * (1 - 1 / MEAN_TOKENS) ** (x - 1)
    else:
        x = np.arange(1, 2696)
        mass = np.where(x == 145, 0.9, np.where(x == 2695, 0.1, 0.0))
    size_s = x * TOKEN_S
    at_or_below = RATE * np.cumsum(size_s * mass)
    below = at_or_below - RATE * size_s * mass
    second = np.cumsum(size_s**2 * mass)
    above = 1 - np.cumsum(mass)
    waiting = RATE * (second + size_s**2 * above) / (2 * (1 - below) * (1 - at_or_below))
    serving = np.cumsum(TOKEN_S / (1 - below))
    return float(((waiting + serving) * mass).sum() / mass.sum())


CASES = {
    "M/M/1 FCFS": (geometric, fcfs_s, 400_000, 1, ENDLESS, by_arrival),
    "M/M/1 PS": (geometric, sharing_s, 50_000, ENDLESS, ENDLESS, by_arrival),
    "M/G/1 PS": (two_valued, sharing_s, 100_000, ENDLESS, ENDLESS, by_arrival),
    "M/M/1 SRPT": (geometric, srpt_s, 50_000, ENDLESS, 1, shortest_remaining),
    "M/G/1 SRPT": (two_valued, srpt_s, 50_000, ENDLESS, 1, shortest_remaining),
}


@pytest.mark.parametrize("name", CASES)
def test_mean_response_is_the_closed_form_within_1_percent(name: str) -> None:
    sizes, closed, jobs, seats, batch, order = CASES[name]
    rows = responses(sizes, jobs, seats, batch, order)
    mean_s, error_s = controlled_mean(rows, sizes, with_work=closed is not fcfs_s)
    assert error_s < 0.0035 * closed(sizes), f"{name}: too few jobs to tell, standard error {error_s:.4f} s"
    assert mean_s == pytest.approx(closed(sizes), rel=0.01), name
    if closed is fcfs_s:  # and job by job, it is Lindley's recursion
        np.testing.assert_allclose(rows[:, 0], found_s(rows) + rows[:, 1], rtol=0, atol=2 * TOKEN_S)


def test_the_forms_differ_enough_to_be_told_apart() -> None:
    """Each case fails under another's discipline: the three are more than 10 % apart."""
    for sizes in (geometric, two_valued):
        srpt, sharing, fcfs = srpt_s(sizes), sharing_s(sizes), fcfs_s(sizes)
        assert srpt < 0.9 * sharing
        assert sharing <= fcfs * 1.001 if sizes is geometric else sharing < 0.9 * fcfs


def test_the_exponential_case_is_one_over_mu_less_lambda() -> None:
    assert fcfs_s(geometric) == pytest.approx(1 / (1 / (MEAN_TOKENS * TOKEN_S) - RATE), rel=0.002)
