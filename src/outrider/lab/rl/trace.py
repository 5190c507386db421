"""The routes of RL steps in one file of Outrider's own routing format, with what is needed to check the rewards again.

A domain a step, `step_0000`; sequences in the order of the update's micro-steps, a prompt's samples side by side. A
row a token that the update computed: all but the last of each sequence, which is a target only. Beside the format's
arrays, which `outrider experts` reads:

    token            [tokens] id of each token; last_token [sequences]
    prompt_tokens    [sequences] how many of them were the prompt
    group            [sequences] samples of one prompt share a number within their step
    reward           [sequences]
"""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters import npz
from outrider.experts.routing import Routing
from outrider.lab.rl.rollouts import Rollout

STEP = "step_{:04d}"


def write(path: Path, steps: Mapping[int, Sequence[Rollout]], experts: int, note: str = "") -> Routing:
    """Write the rollouts of these steps; the table as it was written. note: what made them. CallerError without any."""
    rollouts = [rollout for some in steps.values() for rollout in some]
    if not rollouts:
        raise CallerError(f"{path}: no rollouts to write. Keep at least one step that was run.")
    ends = np.cumsum([0, *(len(some) for some in steps.values())]).tolist()
    lengths = [len(r.tokens) - 1 for r in rollouts]
    routing = Routing.of(
        np.concatenate([r.routes[:-1] for r in rollouts]),
        np.cumsum([0, *lengths]),
        experts=experts,
        domains={STEP.format(step): (ends[i], ends[i + 1]) for i, step in enumerate(steps)},
        notes=(note,) if note else (),
    )
    npz.write_outrider(routing, path)
    more = {
        "token": np.concatenate([np.array(r.tokens[:-1], dtype=np.uint8) for r in rollouts]),
        "last_token": np.array([r.tokens[-1] for r in rollouts], dtype=np.uint8),
        "prompt_tokens": np.array([len(r.prompt) for r in rollouts], dtype=np.uint8),
        "group": np.array([r.group for r in rollouts], dtype=np.int16),
        "reward": np.array([r.reward for r in rollouts], dtype=np.float32),
    }
    _append(path, more)
    return routing


def read(path: Path) -> dict[int, list[Rollout]]:
    """What `write` was given, by step; the row of each last token is -1."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if "last_token" not in arrays:
        raise CallerError(f"{path}: routes without tokens and rewards. Give a file that outrider.lab.rl.learn wrote.")
    steps: dict[int, list[Rollout]] = {}
    offsets = arrays["offsets"]
    for name, (first, end) in zip(arrays["domain_names"], arrays["domain_ranges"].tolist(), strict=True):
        steps[int(re.sub(r"\D", "", str(name)))] = [_rollout(arrays, i, offsets) for i in range(first, end)]
    return steps


def _rollout(arrays: Mapping[str, Any], i: int, offsets: Any) -> Rollout:
    part = slice(int(offsets[i]), int(offsets[i + 1]))
    tokens = (*arrays["token"][part].tolist(), int(arrays["last_token"][i]))
    routes = arrays["routes"][part].astype(np.int16)
    prompt = int(arrays["prompt_tokens"][i])
    whole = np.concatenate([routes, np.full((1, *routes.shape[1:]), -1, dtype=np.int16)])
    return Rollout(tokens[:prompt], tokens[prompt:], whole, int(arrays["group"][i]), float(arrays["reward"][i]))


def _append(path: Path, arrays: Mapping[str, Any]) -> None:
    """More members of an npz: readers of the format pass over names they do not know."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{key}.npy", buffer.getvalue())
