"""A small workload with everything that matters: fan-out, contexts that return, a shared beginning, think times."""

from collections.abc import Callable

import numpy as np
import pytest

from outrider.lab.traces.workload import Call, Workflow, Workload

BLOCK = 16


def reviews(workflows: int = 6, turns: int = 4, seed: int = 3) -> Workload:
    """Each workflow: a planner, two agents of several turns side by side, a last call that waits for both."""
    random = np.random.default_rng(seed)
    next_id = 100
    made = []
    for number in range(workflows):
        name = f"w{number}"

        def call(
            which: str, parents: tuple[str, ...], before: tuple[tuple[int, int], ...], new: int, after_s: float,
            name: str = name,
        ) -> Call:  # fmt: skip
            nonlocal next_id
            prompt = (*before, (next_id, new))
            outputs = int(random.integers(10, 40))
            whole = sum(count for _, count in prompt)
            tokens = whole * BLOCK + 5
            after = (5 + outputs) // BLOCK
            chain = (*before, (next_id, new + after))
            next_id += new + after
            role = which.split("-")[0]
            return Call(
                f"{name}/{which}", role, f"{role}/0", parents, after_s, tokens, outputs, prompt, chain, max_tokens=64
            )

        first = call("plan-0", (), ((0, 4),), 6, 0.0)
        calls, lasts = [first], []
        for side in range(2):
            last, before = first, ((0, 4),)
            for turn in range(turns):
                new = 20 if turn == 0 else 3
                last = call(
                    f"code-{side}-{turn}", (last.id,), before, new, float(random.uniform(0.5, 3.0)) * (turn > 0)
                )
                before = last.chain
                calls.append(last)
            lasts.append(last.id)
        calls.append(call("sum-0", tuple(lasts), ((0, 4),), 8, 0.1))
        made.append(Workflow(name, 0.7 * number, tuple(calls)))
    return Workload("outrider", "made", BLOCK, tuple(made), ("made for a test",)).check()


@pytest.fixture
def workload() -> Workload:
    return reviews()


@pytest.fixture
def make_reviews() -> Callable[..., Workload]:
    return reviews
