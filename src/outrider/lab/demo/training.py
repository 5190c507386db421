"""The demo's last act: roll out `tiny-moe` on the embedded engine, then one RL step, unbalanced and balanced.

Prompts are pieces of the source tree under review, two rollouts each; routes are those that the engine recorded. The
weights are random and the reward is a property of the text: what is shown is balance and exactness, not learning.
"""

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from outrider.errors import WorldError
from outrider.lab.demo import workload
from outrider.lab.processes import Children, await_http, free_port
from outrider.lab.rl import rollouts, step

MODEL = "tiny-moe"
STEPS = 2  # of the progress bar: rollouts, the RL step
SAMPLES = 2  # rollouts of one prompt, a group
CONCURRENT = 4
START_S = 120.0


def run(run_dir: Path, roots: tuple[Path, ...], quick: bool, on_step: Callable[[str], None]) -> dict[str, Any]:
    """The demo's `experts` figures; journals of both arms go to run_dir/experts."""
    own = run_dir / "experts"
    own.mkdir()
    prompts, output_tokens = (6, 24) if quick else (16, 48)
    shape = workload.Shape(workflows=prompts, reviewers=1, excerpt_chars=600)
    asks = [flow.reviewers[0].opening for flow in workload.build(roots, shape)]
    batch = rolled_out(own, asks, output_tokens)
    on_step("experts: one RL step")
    figures = step.compare(MODEL, batch, journal_dir=own, micro_batch_tokens=512)
    on_step("experts: done")
    return {**figures, "rollouts": len(batch), "model": f"{MODEL}, random weights"}


def rolled_out(log_dir: Path, asks: list[str], output_tokens: int) -> list[rollouts.Rollout]:
    """Sample every ask SAMPLES times on an engine of our own, with the routes of every token.

    An engine that dies is started again, once, and the whole batch rolled out anew: seeds make it the same batch.
    """
    try:
        return _roll_out(log_dir, asks, output_tokens)
    except WorldError:
        return _roll_out(log_dir, asks, output_tokens)


def _roll_out(log_dir: Path, asks: list[str], output_tokens: int) -> list[rollouts.Rollout]:
    port = free_port()
    jobs = [(group, sample) for group in range(len(asks)) for sample in range(SAMPLES)]
    # the pool outside: on Ctrl-C the engine dies first, and with it what the pool's threads wait for
    with ThreadPoolExecutor(CONCURRENT) as pool, Children(log_dir) as children:
        engine = children.outrider(
            "rollout-engine", "engine", "--model", MODEL, "--port", str(port), "--kv-tokens", "8192"
        )
        url = f"http://127.0.0.1:{port}"
        await_http(engine, f"{url}/health", START_S)
        answers = [pool.submit(_sample, url, asks[group], group, sample, output_tokens) for group, sample in jobs]
        try:
            return [answer.result() for answer in answers]
        except OSError as error:  # urllib's errors are OSErrors; so is a connection that was reset
            raise WorldError(f"rollouts: {error}. The engine said: {engine.last_words()}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _sample(url: str, ask: str, group: int, sample: int, output_tokens: int) -> rollouts.Rollout:
    body = {
        "model": MODEL,
        "prompt": ask,
        "max_tokens": output_tokens,
        "temperature": 1.0,
        "seed": group * SAMPLES + sample,
        "return_routed_experts": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    return rollouts.from_choice(
        choice["prompt_token_ids"], choice["token_ids"], choice, group, rollouts.readable(choice["text"])
    )
