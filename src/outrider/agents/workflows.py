"""What is known of each workflow under way: what it was served, which of its contexts may come back. Pure.

    path    the context of a finished call, named by the call's id as memory knows it; open until a later call of the
            same workflow begins with the same prompt (it returned) or the workflow ends (it did not)

All of it is bounded: workflows by the settings, and inside each the constants below.
"""

import msgspec

from outrider.agents.events import Call, Command, Tell, Usage
from outrider.agents.foresee import Key, Remaining, Returns, Samples
from outrider.agents.lru import Lru
from outrider.agents.rates import Rates
from outrider.agents.settings import Foresight
from outrider.wants import Want

PATHS = 64  # open contexts of one workflow
SERVED = 512  # calls of one workflow that its remaining work is learned from
IDLE_S = 900.0  # without a call, after which a workflow counts as over
LEAST_CHANCE = 0.05  # of a return, below which memory is not bothered


class Path(msgspec.Struct):
    """One context that may come back: its prompt's last digest, who spoke, and when the answer ended."""

    call_id: str
    tip: str
    key: Key
    finished_s: float
    wanted: bool = False  # memory was told
    successor: str = ""  # the call that took it up


class Workflow:
    """One workflow under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.klass = ""
        self.active = 0  # calls waiting or running
        self.seen_s = 0.0
        self.served: list[tuple[Key, float]] = []
        self.lengths: Lru[Key, Samples] = Lru(32)
        self.groups: Lru[str, tuple[int, float]] = Lru(64)  # parent -> class rank and remaining seconds of its children
        self.paths: Lru[str, Path] = Lru(PATHS)

    def serve(self, key: Key, service_s: float) -> None:
        if len(self.served) < SERVED:
            self.served.append((key, service_s))

    def returning(self, call: Call) -> Path | None:
        """The open path that `call` takes up: the longest whose prompt its own begins with."""
        tips = {path.tip: path for path in self.paths.values() if not path.successor}
        for link in reversed(call.chain):
            if link.digest in tips:
                return tips[link.digest]
        return None

    def superseded_by(self, call_id: str) -> list[Path]:
        """Paths that `call_id` took up: their blocks now belong to its own path. They are closed."""
        done = [path for path in self.paths.values() if path.successor == call_id]
        for path in done:
            self.paths.pop(path.call_id)
        return done

    def disowned_by(self, call_id: str) -> None:
        """`call_id` took them up and ended badly: they are open again."""
        for path in self.paths.values():
            if path.successor == call_id:
                path.successor = ""

    def close(self) -> list[Path]:
        """The workflow ended: every path still open, which is now closed."""
        done = list(self.paths.values())
        for path in done:
            self.paths.pop(path.call_id)
        return done


class Workflows:
    """All workflows under way, and what ended ones taught: remaining work and returns."""

    def __init__(self, settings: Foresight, memory: bool) -> None:
        self.remaining = Remaining(settings)
        self.returns = Returns(settings)
        self.memory = memory
        self._open: Lru[str, Workflow] = Lru(settings.workflows)
        self._by_tip: Lru[str, str] = Lru(settings.workflows)  # last prompt digest of a nameless workflow -> its name

    def enter(self, call: Call, now: float) -> tuple[Workflow, list[Command]]:
        """The workflow of an arriving call, and withdrawals for one that had to be forgotten for it.

        A call without an id belongs to the workflow whose last prompt its own begins with, else to one of its own.
        """
        name = f"{call.tenant}/{call.identity.workflow}" if call.identity.workflow else self._inferred(call)
        commands = self._end_idle(now)
        workflow = self._open.get(name)
        if workflow is None:
            workflow = Workflow(name)
            for forgotten in self._open.put(name, workflow):
                commands += self._end(forgotten, now)
        workflow.active += 1
        workflow.seen_s = now
        path = workflow.returning(call)
        if path is not None:
            path.successor = call.id
            self.returns.learn(path.key, now - path.finished_s)
        return workflow, commands

    def leave(
        self, call: Call, name: str, usage: Usage | None, prefill_s: float, rates: Rates, now: float
    ) -> list[Command]:
        """A call ended; usage None: badly, nothing is learned. Returns what memory should hear."""
        workflow = self._open.get(name)
        if workflow is None:
            return []
        commands: list[Command] = []
        workflow.active -= 1
        workflow.seen_s = now
        if usage is None:
            workflow.disowned_by(call.id)
        else:
            key = (call.identity.role, call.identity.stage_name)
            workflow.serve(key, prefill_s + usage.output_tokens * rates.decode_s)
            workflow.lengths.ensure(key, Samples).add(usage.output_tokens)
            for path in workflow.superseded_by(call.id):
                commands += self._withdraw(path, now)
            if call.chain and not call.identity.final:
                commands += self._open_path(workflow, call, usage, rates, now)
        if call.identity.final:
            self._open.pop(name)
            commands += self._end(workflow, now)
        return commands

    def _open_path(self, workflow: Workflow, call: Call, usage: Usage, rates: Rates, now: float) -> list[Command]:
        """The call's context may come back: remember it, and want it near by then if that saves time."""
        commands: list[Command] = []
        key = (call.identity.role, call.identity.stage_name)
        path = Path(call.id, call.chain[-1].digest, key, now)
        for dropped in workflow.paths.put(call.id, path):
            commands += self._withdraw(dropped, now)
        if not call.identity.workflow:
            self._by_tip.put(path.tip, workflow.name)
        gap_s, chance = self.returns.predict(key)
        tokens = (usage.prompt_tokens or rates.prompt_tokens(call.chars)) + usage.output_tokens
        saved_s = chance * tokens * max(0.0, rates.prefill_s - rates.load_s)
        if self.memory and chance >= LEAST_CHANCE and saved_s > 0:
            path.wanted = True
            commands.append(Tell(Want(item=call.id, place="host", by_s=now + gap_s, saved_s=saved_s)))
        return commands

    def _end_idle(self, now: float) -> list[Command]:
        """Workflows that never say final end by silence, the longest silent first."""
        commands: list[Command] = []
        while (
            (first := next(self._open.values(), None)) is not None and first.active <= 0 and now - first.seen_s > IDLE_S
        ):
            self._open.pop(first.name)
            commands += self._end(first, now)
        return commands

    def _end(self, workflow: Workflow, now: float) -> list[Command]:
        """A workflow is over or forgotten: learn from the whole of it, withdraw what it still wanted."""
        self.remaining.learn(workflow.served)
        commands: list[Command] = []
        for path in workflow.close():
            if not path.successor:
                self.returns.learn(path.key, None)
            commands += self._withdraw(path, now)
        return commands

    def _withdraw(self, path: Path, now: float) -> list[Command]:
        if not path.wanted:
            return []
        path.wanted = False
        return [Tell(Want(item=path.call_id, place="host", by_s=now, saved_s=0.0))]

    def _inferred(self, call: Call) -> str:
        for link in reversed(call.chain):
            name = self._by_tip.get(link.digest)
            if name is not None:
                return name
        return f"{call.tenant}/alone/{call.id}"

    def __len__(self) -> int:
        return len(self._open)
