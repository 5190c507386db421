"""experts: every micro-step of MoE RL post-training balanced, exactly, from the routing that rollouts recorded.

    import numpy as np
    from outrider.experts import foresee, plan

    routes = np.random.default_rng(0).zipf(1.3, (4096, 1, 4)) % 16        # [tokens, layers, top_k]: skewed, synthetic
    half = np.arange(4096) // 2048                                        # two micro-batches, two source ranks
    replicas = None
    for counts in foresee(routes, batch=half, source=np.arange(4096) % 2, experts=16, ranks=2):
        step = plan(counts, slots=2, previous_LRS=replicas)
        replicas, home = step.replicas_LRS, counts.sum(1).reshape(2, 8).sum(1)
        print(f"max/mean {home.max() / home.mean():.3f} -> {step.most_L[0] / home.mean():.3f}, {len(step.moves)} moved")

This much needs numpy, and numba from the first call on. Carrying plans out on a torch model takes one call:
`outrider.experts.balance(model)`, see `balanced.py`.
"""

from typing import Any

from outrider.experts.eplb import rebalance_experts
from outrider.experts.foresee import counts, foresee
from outrider.experts.plan import Plan, contiguous_homes, plan
from outrider.experts.policy import Policy, Settings
from outrider.experts.routing import Routing
from outrider.experts.split import Split, split

__all__ = [
    "Plan",
    "Policy",
    "Routing",
    "Settings",
    "Split",
    "balance",
    "contiguous_homes",
    "counts",
    "foresee",
    "plan",
    "rebalance_experts",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "balance":
        from outrider.experts.balanced import balance  # needs torch, which the rest does without

        return balance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
