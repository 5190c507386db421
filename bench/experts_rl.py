"""Our own RL traces: does the model learn, is its load stable, and how evenly is it planned? A tiny MoE on a CPU.

    python bench/experts_rl.py                          # 10 minutes on one free core; all routes go to build/rl
    python bench/experts_rl.py --part stability         # at once, where they are

learning   three seeds of `python -m outrider.lab.rl.learn` as it stands, and one with the routers' auxiliary loss:
           mean reward of the first and last 50 RL steps. Seconds are the process's own, one thread.
stability  total variation (half the sum of absolute differences of shares) of expert loads, mean over layers and
           neighbours. prompts: micro-steps of whole sequences in the order of rollout, a prompt's samples side by
           side; prompts_apart: only neighbours that share no prompt; shuffled: the same sequences in random order;
           floor: the tokens dealt out at random to the same sizes, so what sampling alone would give. For steps:
           floor deals out the tokens of both, floor_prompts their prompts: the rest would be drift.
planning   `outrider experts plan` on the first, a middle and the last RL step, 2 spare slots: over_bound (largest rank
           load / ceil(mean)) and copies a layer and micro-step, of Outrider and its rivals; by prompts, and shuffled.

--excerpt DIR writes the steps of each seed that lie in tests/lab/rl/traces.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from outrider.experts.adapters import npz, read
from outrider.experts.routing import Routing
from outrider.experts.study import Study, run
from outrider.lab.rl import trace
from outrider.lab.rl.learn import Recipe

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench/results/experts_rl.json"
RECIPES = {f"seed{seed}": Recipe(seed=seed) for seed in range(3)}
RECIPES["seed0-balance-loss"] = Recipe(seed=0, balance_weight=0.01)
STEPS, WINDOW = Recipe().steps, 50
SEQUENCES, SAMPLES = Recipe().prompts * Recipe().samples, Recipe().samples
STAGES = {"first": 0, "middle": STEPS // 2 - 10, "last": STEPS - 21}  # 20 steps each
KEPT = (0, 1, STEPS // 2 - 1, STEPS // 2, STEPS - 2, STEPS - 1)
PLANNED = (0, STEPS // 2, STEPS - 1)
PLANNERS = ("foresight", "split", "eplb-oracle", "eplb", "static")
SIZES, RANKS, SLOTS = (1, 2, 4, 8, 32), (4, 8), 2


def learn(name: str, path: Path) -> float:
    """Run the script unless its trace is there already; seconds of processor time, 0 for one that was there."""
    recipe = RECIPES[name]
    if path.exists() and msgspec.json.decode(read(path).notes[0], type=Recipe) == recipe:
        return 0.0
    command = [sys.executable, "-m", "outrider.lab.rl.learn", "--seed", str(recipe.seed), "--out", str(path)]
    if recipe.balance_weight:
        command += ["--balance-weight", str(recipe.balance_weight)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def learning(path: Path, cpu_s: float, before: dict[str, Any]) -> dict[str, Any]:
    means = np.array([np.mean([r.reward for r in rollouts]) for rollouts in trace.read(path).values()])
    first, last = means[:WINDOW].mean(), means[-WINDOW:].mean()
    return {
        "reward_first_50": round(float(first), 4),
        "reward_last_50": round(float(last), 4),
        "ratio": round(float(last / first), 2),
        "cpu_s": round(cpu_s, 1) if cpu_s else before.get("cpu_s"),
        "rl_steps": len(means),
    }


class Step:
    """Routes of one RL step [tokens, layers, top_k], and whose each token is."""

    def __init__(self, routes: Any, sequence: Any, experts: int) -> None:
        self.routes, self.sequence, self.experts = routes, sequence, experts

    @classmethod
    def of(cls, routing: Routing, index: int) -> "Step":
        table = routing.domain(list(routing.domains)[index])
        return cls(table.routes_TLK, np.repeat(np.arange(table.sequences), np.diff(table.offsets_S1)), table.experts)

    def whole(self) -> Any:
        """[layers, experts] of all tokens."""
        return self.loads(np.zeros(len(self.routes), dtype=np.int64))[0]

    def loads(self, owner: Any) -> Any:
        """[owners, layers, experts] token-slots."""
        owners = int(owner.max()) + 1
        layers = range(self.routes.shape[1])
        cells = [(owner[:, None] * self.experts + self.routes[:, layer]).ravel() for layer in layers]
        counted = [np.bincount(some, minlength=owners * self.experts).reshape(owners, -1) for some in cells]
        return np.stack(counted, axis=1)


def variation(a: Any, b: Any) -> Any:
    """[..., layers] total variation of two loads."""
    return np.abs(a / a.sum(-1, keepdims=True) - b / b.sum(-1, keepdims=True)).sum(-1) / 2


def between(loads: Any, every: int = 1) -> float:
    """Mean over neighbours, or over those at every so-many-th border."""
    return float(variation(loads[every:], loads[every - 1 : -1])[:: max(1, every)].mean())


def of_micro_steps(step: Step, rng: np.random.Generator) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size in SIZES:
        owner = step.sequence // size
        order = rng.permutation(SEQUENCES)
        result[f"{size} sequences"] = {
            "prompts": between(step.loads(owner)),
            "prompts_apart": between(step.loads(owner), max(1, SAMPLES // size)),
            "shuffled": between(step.loads(order[step.sequence] // size)),
            "floor": between(step.loads(rng.permutation(owner))),
        }
    return result


def of_steps(one: Step, two: Step, rng: np.random.Generator) -> dict[str, float]:
    sequence = np.concatenate([one.sequence, SEQUENCES + two.sequence])
    both = Step(np.concatenate([one.routes, two.routes]), sequence, one.experts)
    owner = sequence // SEQUENCES
    dealt = rng.permutation(2 * SEQUENCES // SAMPLES) % 2
    return {
        "neighbours": between(both.loads(owner)),
        "floor": between(both.loads(rng.permutation(owner))),
        "floor_prompts": between(both.loads(dealt[sequence // SAMPLES])),
    }


def averaged(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: averaged([part[key] for part in parts]) for key in parts[0]}
    return round(float(np.mean(parts)), 5)


def stability(path: Path) -> dict[str, Any]:
    routing, rng = read(path), np.random.default_rng(0)
    result: dict[str, Any] = {}
    for stage, begin in STAGES.items():
        steps = [Step.of(routing, begin + i) for i in range(21)]
        hottest = [float((w.max(-1) / w.mean(-1)).mean()) for w in (step.whole() for step in steps)]
        result[stage] = {
            "step": averaged([of_steps(one, two, rng) for one, two in pairwise(steps)]),
            "micro_step": averaged([of_micro_steps(step, rng) for step in steps[:20]]),
            "hottest_expert_over_mean": averaged(hottest),
        }
    every = [Step.of(routing, i).whole() for i in range(0, STEPS, 10)]
    result["steps_apart"] = {
        str(lag): averaged([float(variation(*pair).mean()) for pair in zip(every, every[lag // 10 :], strict=False)])
        for lag in (10, 50, 100, 200)
    }
    return result


def shuffled(path: Path, domain: str, to: Path) -> Path:
    """The sequences of a step in random order."""
    table = read(path, domain=domain)
    order = np.random.default_rng(0).permutation(table.sequences)
    parts = [table.routes_TLK[table.offsets_S1[i] : table.offsets_S1[i + 1]] for i in order]
    offsets = np.cumsum([0, *map(len, parts)])
    npz.write_outrider(Routing.of(np.concatenate(parts), offsets, experts=table.experts), to)
    return to


def planning(paths: list[Path]) -> dict[str, Any]:
    """By EP size, sequences and order: each planner's figures, means over seeds and RL steps; and the bar's worst."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, step in product(paths, PLANNED):
            domain = trace.STEP.format(step)
            files = {"prompts": path, "shuffled": shuffled(path, domain, Path(folder) / "shuffled.npz")}
            for ranks, size, (order, file) in product(RANKS, SIZES, files.items()):
                asked = {"slots": SLOTS, "microbatch_seqs": size, "domain": domain if file == path else None}
                row = {planner: figures(file, Study(ranks, ranks, planner=planner, **asked)) for planner in PLANNERS}
                rows.setdefault(f"EP {ranks}, {size} sequences, {order}", []).append(row)
    everything = [row for some in rows.values() for row in some]
    worst = {
        "cases": len(everything),
        "over_bound_mean": max(row["foresight"]["over_bound_mean"] for row in everything),
        "over_bound_p95": max(row["foresight"]["over_bound_p95"] for row in everything),
        "copies_over_eplb_oracle": max(row["foresight"]["copies"] / row["eplb-oracle"]["copies"] for row in everything),
    }
    return {"worst case of foresight": averaged([worst]), "means": {key: averaged(some) for key, some in rows.items()}}


def figures(path: Path, study: Study) -> dict[str, float]:
    _, found = run(path, study)
    over = found["over_bound"]
    return {
        "over_bound_mean": over["mean"],
        "over_bound_p95": over["p95"],
        "copies": found["copies_per_layer_microstep"],
    }


def excerpt(path: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    routing, steps = read(path), trace.read(path)
    trace.write(to / path.name, {step: steps[step] for step in KEPT}, routing.experts, routing.notes[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, default=ROOT / "build/rl", help="where the routes of all steps are kept")
    parser.add_argument("--part", choices=["learning", "stability", "planning", "all"], default="all")
    parser.add_argument("--excerpt", type=Path)
    options = parser.parse_args()
    options.traces.mkdir(parents=True, exist_ok=True)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"real": "routes of a tiny MoE trained here", "recipe": msgspec.to_builtins(Recipe())}
    result["machine"] = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    paths = {name: options.traces / f"{name}.npz" for name in RECIPES}
    for name, path in paths.items():
        cpu_s = learn(name, path)
        if options.part in ("learning", "all"):
            part = result.setdefault("learning", {})
            part[name] = learning(path, cpu_s, part.get(name, {}))
            print(name, part[name], flush=True)
    seeds = [name for name in paths if not RECIPES[name].balance_weight]
    if options.part in ("stability", "all"):
        by_run = {name: stability(path) for name, path in paths.items()}
        result["stability"] = {"mean of seeds": averaged([by_run[name] for name in seeds])} | by_run
        print(json.dumps(result["stability"]["mean of seeds"], indent=1), flush=True)
    if options.part in ("planning", "all"):
        result["planning"] = planning([paths[name] for name in seeds])
        print(json.dumps(result["planning"], indent=1), flush=True)
    if options.excerpt:
        for name in seeds:
            excerpt(paths[name], options.excerpt)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
