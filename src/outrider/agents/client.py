"""What a client needs to say who speaks: headers for any OpenAI or Anthropic client. Pure.

import openai
from outrider.agents import workflow

with workflow("wf-7f3", klass="interactive", deadline_s=30) as wf:
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")
    ask = [{"role": "user", "content": "Write a parser."}]
    code = client.chat.completions.create(model="m", messages=ask, extra_headers=wf.headers("coder", "code/1"))
    ask += [code.choices[0].message, {"role": "user", "content": "Now test it."}]
    client.chat.completions.create(model="m", messages=ask, extra_headers=wf.headers("coder", "code/2", final=True))
"""

from types import TracebackType

from outrider.errors import CallerError


class Workflow:
    """One workflow: what its calls have in common."""

    def __init__(self, name: str, klass: str = "", deadline_s: float | None = None) -> None:
        if klass not in ("", "interactive", "batch"):
            raise CallerError(f"workflow {name}: class {klass!r} given. It is interactive or batch.")
        self.name = name
        self._shared = {"Outrider-Workflow": name}
        if klass:
            self._shared["Outrider-Class"] = klass
        if deadline_s is not None:
            self._shared["Outrider-Deadline"] = f"{deadline_s:g}s"

    def headers(
        self, role: str = "", stage: str = "", parent: str = "", next_role: str = "", final: bool = False
    ) -> dict[str, str]:
        """Headers of one call. stage: name/index; parent: who waits for it; final: the workflow's last call."""
        own = {"Role": role, "Stage": stage, "Parent": parent, "Next": next_role, "Final": "true" if final else ""}
        return self._shared | {f"Outrider-{name}": value for name, value in own.items() if value}

    def __enter__(self) -> "Workflow":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close: the gateway ends a workflow at its final call or when it falls silent."""


def workflow(name: str, klass: str = "", deadline_s: float | None = None) -> Workflow:
    """A workflow called `name`; class interactive | batch; deadline in seconds per call."""
    return Workflow(name, klass, deadline_s)
