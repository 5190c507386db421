"""A few lines of each format, written here; and the real files, where they are."""

import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[4] / "shared" / "data"
SECRET = "the launch code is 4711"

Line = dict[str, Any] | str
Write = Callable[..., Path]

CLAUDE: list[Line] = [
    {
        "id": "s1",
        "block_size": 64,
        "hash_id_scope": "local",
        "requests": [
            {"t": 0.0, "type": "n", "in": 130, "out": 70, "api_time": 4.0, "hash_runs": [[1, 2]]},
            {"t": 9.0, "type": "s", "in": 260, "out": 10, "api_time": 2.0, "ttft": 0.5, "hash_runs": [[1, 4]]},
        ],
    },
    {
        "id": "s2",
        "block_size": 64,
        "hash_id_scope": "local",
        "requests": [{"t": 0.0, "type": "n", "in": 64, "out": 1, "api_time": 1.0, "hash_runs": [[1, 1]]}],
    },
]
CHATDEV: list[Line] = [
    {
        "run": "game",
        "seq": n,
        "parent": n - 1 if n else None,
        "chat": 0,
        "phase": "Coding",
        "role": role,
        "partner": "x",
        "turn": n,
        "model": "m",
        "system": f"You are {role}. {SECRET}",
        "prompt": f"{SECRET} {n}",
        "completion": SECRET,
        "in_tok": 100 + 60 * n,
        "out_tok": 20,
        "t_send": f"2023-09-18T11:05:{10 * n:02d}" if n else None,
        "t_recv": f"2023-09-18T11:05:{10 * n + 6:02d}",
    }
    for n, role in enumerate(("Programmer", "Tester", "Programmer"))
]
TAU2: list[Line] = [
    {"kind": "system", "agent_policy": SECRET * 9, "user_guidelines": SECRET * 3, "agent_llm": "m", "user_llm": "m"},
    {
        "kind": "session",
        "session": "a",
        "task_id": "1",
        "start": "2025-08-01T16:16:37.000000",
        "user_scenario": {"persona": SECRET},
    },
    {"kind": "msg", "role": "agent", "i": 0, "t": "2025-08-01T16:16:37.250000", "text": "Hi!"},
    {
        "kind": "msg",
        "role": "user_sim",
        "i": 1,
        "t": "2025-08-01T16:16:38.000000",
        "text": SECRET,
        "in_tok": 90,
        "out_tok": 9,
    },
]
MOONCAKE: list[Line] = [
    {"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1024, "output_length": 1, "hash_ids": [0, 7]},
]
AZURE: list[Line] = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.6805900,396,109",
]


def _journal() -> list[Line]:
    chain = [["aa", 100], ["bb", 300]]
    who = {"workflow": "w", "role": "planner", "stage": "plan/0"}
    call = {"id": "call-1", "identity": who, "path": "/v1/messages", "chars": 400, "max_tokens": 48, "chain": chain}
    usage = {"prompt_tokens": 100, "output_tokens": 20, "cached_tokens": 0, "external_tokens": 0, "estimated": False}
    settle = {"type": "Settle", "call": "call-1", "engine": "e", "status": 200, "usage": usage}
    return [
        {"policy": "agents", "rank": 0, "settings": {}, "outrider": "0.1.0", "journal": 1},
        {"now": 5.0, "event": {"type": "Arrived", "call": call}, "commands": []},
        {
            "now": 7.0,
            "event": {"type": "Finished", "call": "call-1", "attempt": 1, "status": 200, "usage": usage},
            "commands": [{**settle, "ttft_s": 1.0, "total_s": 2.0}],
        },
    ]


SAMPLES: dict[str, list[Line]] = {
    "claude-code": CLAUDE,
    "chatdev": CHATDEV,
    "tau2": TAU2,
    "mooncake": MOONCAKE,
    "azure": AZURE,
    "outrider": _journal(),
}


@pytest.fixture(params=sorted(SAMPLES))
def sample(request: pytest.FixtureRequest) -> tuple[str, list[Line]]:
    """A format's name and a small file of it."""
    return request.param, [line if isinstance(line, str) else dict(line) for line in SAMPLES[request.param]]


@pytest.fixture
def samples() -> dict[str, list[Line]]:
    return SAMPLES


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines (dictionaries as JSON) to a file whose name says nothing; packed: as xz."""

    def write(lines: Sequence[Line], packed: bool = False, name: str = "data") -> Path:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path = tmp_path / name
        path.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
        return path

    return write


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """The path of a real file; skips where it is not here."""

    def real(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"the real trace is not here ({DATA / name}); synthetic ones test the same rules")
        return DATA / name

    return real
