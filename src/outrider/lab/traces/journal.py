"""Reader of Outrider's own journals: `agents.jsonl` of a live or simulated run becomes the load that the run served.

Two runs that were asked the same give the same workload, however they served it: calls are named and numbered by what
they ask, not by when. Only the measured seconds differ by noise. What a call waited for, first rule that fits:

    its parent by name     the id of a call of its workflow
    it goes on             its prompt begins with the whole prompt of an earlier call: what that one led to (sub-agents
                           that it launched), or that one alone
    it begins anew         every call answered before that no other answered call had followed (order.py)
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from outrider.agents.events import Call as Asked
from outrider.agents.events import Link, Usage
from outrider.agents.prompt import PIECE
from outrider.lab.traces.blocks import Ids, Piece, PrefixTree, answered
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.order import Answered, Frontier, gap_s
from outrider.lab.traces.runs import Runs
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

KEYS = ("journal", "policy", "settings")
BLOCK_TOKENS = 16
SLACK_S = 0.05  # a client may ask again before the gateway has written that the answer's last byte left
ENDINGS = {
    "Settle": "answered with an error",
    "Reject": "rejected",
    "Relay": "refused by the engine",
    "Break": "broken in mid-answer",
    "Abort": "given up by their client",
}


class _Header(msgspec.Struct):
    policy: str


class _Event(msgspec.Struct):
    type: str
    call: msgspec.Raw = msgspec.Raw(b"")


class _Command(msgspec.Struct):
    type: str
    call: str = ""
    status: int = 0
    usage: Usage | None = None


class _Line(msgspec.Struct):
    now: float
    event: _Event
    commands: tuple[_Command, ...]


@dataclass
class _Seen:
    """A call of the journal. `child` is the first call, by name, that goes on from its prompt."""

    asked: Asked
    arrived_s: float
    ended_s: float = 0.0
    ending: str = ""
    usage: Usage | None = None
    parents: tuple["_Seen", ...] = ()
    gap_s: float = 0.0
    depth: int = 0
    going_on: "_Seen | None" = None
    name: str = ""
    prompt: Runs = ()

    @property
    def tip(self) -> str:
        return self.asked.chain[-1].digest if self.asked.chain else ""

    @property
    def rank(self) -> tuple[int, int, str, str, str]:
        """What it asks: equal for the same call of another run."""
        return len(self.asked.chain), self.asked.chars, self.tip, self.asked.identity.role, self.asked.identity.stage


def read(source: Source, limit: int | None) -> Draft:
    """Every workflow of the run that has an answered call."""
    seen = _seen(source)
    kept = [call for call in seen if call.ending == "" and call.usage is not None]
    flows = _flows(kept)
    _date_from_first_send(seen, flows)
    for calls in flows.values():
        _order(calls)
    ids = Ids()
    _lay(kept, PrefixTree(BLOCK_TOKENS, ids))
    workflows = [_workflow(name, calls, ids) for name, calls in flows.items()]
    return Draft(BLOCK_TOKENS, workflows, True, tuple(_notes(seen, kept)))


def _seen(source: Source) -> list[_Seen]:
    """Every call that arrived, with how it ended; `ending` is empty where it was answered well."""
    calls: dict[str, _Seen] = {}
    decoder, asked = msgspec.json.Decoder(_Line), msgspec.json.Decoder(Asked)
    header = msgspec.json.Decoder(_Header)
    for number, raw in source.lines():
        if number == 1:
            policy = source.decode(number, raw, header).policy
            if policy != "agents":
                raise source.fault(number, f"the journal of {policy!r}; calls are in agents.jsonl")
            continue
        if not raw.endswith(b"\n"):
            break  # a torn last line was never acknowledged
        line = source.decode(number, raw, decoder)
        if line.event.type == "Arrived":
            call = source.decode(number, bytes(line.event.call), asked)
            calls[call.id] = _Seen(call, line.now, ending="still open at the journal's end")
        for command in line.commands:
            if command.type in ENDINGS and command.call in calls:
                ended = calls[command.call]
                well = command.type == "Settle" and command.status < 400
                ended.ended_s, ended.ending, ended.usage = line.now, ENDINGS[command.type], command.usage
                if well:
                    ended.ending = "" if command.usage else "answered without token counts"
    return list(calls.values())


def _flows(kept: Sequence[_Seen]) -> dict[str, list[_Seen]]:
    """Calls by workflow, in order of arrival. A nameless call joins the workflow whose prompt it goes on from."""
    flows: dict[str, list[_Seen]] = {}
    nameless: dict[tuple[str, str], str] = {}  # tenant, last digest of a prompt -> workflow
    for call in kept:
        tenant, name = call.asked.tenant, call.asked.identity.workflow
        if name:
            name = f"{tenant}/{name}" if tenant else name
        else:
            known = (nameless.get((tenant, link.digest)) for link in reversed(call.asked.chain))
            name = next(filter(None, known), f"{tenant}/nameless-{call.tip or call.asked.id}".lstrip("/"))
            nameless[tenant, call.tip] = name
        flows.setdefault(name, []).append(call)
    return flows


def _date_from_first_send(seen: Iterable[_Seen], flows: dict[str, list[_Seen]]) -> None:
    """A call sent again after a bad ending began when it was first sent."""
    failed: dict[tuple[str, str, str], float] = {}
    for call in seen:
        key = (call.asked.tenant, call.asked.identity.workflow, call.tip)
        if call.ending:
            failed.setdefault(key, call.arrived_s)
        elif call.tip and key in failed:
            call.arrived_s = failed.pop(key)
    for calls in flows.values():
        calls.sort(key=lambda call: call.arrived_s)


def _order(calls: Sequence[_Seen]) -> None:
    """What each call of one workflow waited for, and how long after that it began."""
    frontier = Frontier(SLACK_S)
    by_id = {call.asked.id: call for call in calls}
    whole: dict[str, _Seen] = {}  # last digest of a prompt -> the last call that asked it
    place = {call.asked.id: number for number, call in enumerate(calls)}
    above: dict[str, int] = {}  # call -> its ancestors and itself, a bit each
    for number, call in enumerate(calls):
        before = frontier.before(call.arrived_s)
        limit_s = call.arrived_s + SLACK_S
        last = _goes_on_from(call, whole, limit_s)
        named = by_id.get(call.asked.identity.parent)
        if named is not None and named is not call and named.asked.id in above and named.ended_s <= limit_s:
            parents = [named] if last is None or last is named else [named, last]
        elif last is not None:
            own = 1 << place[last.asked.id]
            led_to = [by_id[other.call] for other in before if above[other.call] & own and other.call != last.asked.id]
            parents = led_to or [last]
        else:
            parents = [by_id[other.call] for other in before]
        call.parents = tuple(parents)
        call.depth = 1 + max((parent.depth for parent in parents), default=0)
        ends = [Answered(parent.asked.id, parent.ended_s) for parent in parents]
        call.gap_s = gap_s(call.arrived_s, ends, calls[0].arrived_s)
        above[call.asked.id] = 1 << number
        for parent in parents:
            above[call.asked.id] |= above[parent.asked.id]
        frontier.enter(call.asked.id, call.ended_s, [parent.asked.id for parent in parents])
        if call.tip:
            whole[call.tip] = call


def _goes_on_from(call: _Seen, whole: dict[str, _Seen], limit_s: float) -> _Seen | None:
    """The call with the longest prompt that this one's begins with; it must have been answered by limit_s."""
    for link in reversed(call.asked.chain[:-1]):
        earlier = whole.get(link.digest)
        if earlier is not None and earlier.ended_s <= limit_s:
            if earlier.going_on is None or call.rank < earlier.going_on.rank:
                earlier.going_on = call
            return earlier
    return None


def _lay(kept: Iterable[_Seen], tree: PrefixTree) -> None:
    """Block ids of every prompt, shortest first, so that equal loads get equal ids."""
    for call in sorted(kept, key=lambda call: (call.rank, call.usage.prompt_tokens if call.usage else 0)):
        assert call.usage is not None
        call.prompt = tree.lay(_pieces(call.asked), call.usage.prompt_tokens)


def _pieces(asked: Asked) -> Iterable[Piece]:
    """The chain's links. A link inside a long message is cut in half, and its first half taken to be the same whatever
    it says: prompts that have all before it in common part somewhere in it, in its middle for want of knowing better.
    """
    before: Link | None = None
    for link in asked.chain:
        half = link.chars // 2 if before is not None and before.chars == PIECE else 0
        if half and before is not None:
            yield (before.digest, "first half of what follows"), half
        yield link.digest, link.chars - half
        before = link
    unchained = asked.chars - sum(link.chars for link in asked.chain)
    if unchained > 0:  # the gateway chains only the beginning of a very long prompt
        yield asked.id, unchained


def _workflow(name: str, calls: Sequence[_Seen], ids: Ids) -> Workflow:
    """Calls are listed by depth, then by what they ask."""
    listed = sorted(calls, key=lambda call: (call.depth, call.asked.identity.role, call.rank))
    for number, call in enumerate(listed):
        call.name = f"{name}/{number}"
    made: list[Call] = []
    for call in listed:
        assert call.usage is not None
        lengths = call.usage.prompt_tokens, call.usage.output_tokens
        following = call.going_on.prompt if call.going_on is not None else ()
        chain = answered(call.prompt, following, sum(lengths) // BLOCK_TOKENS, ids)
        parents = tuple(sorted(parent.name for parent in call.parents))
        who = call.asked.identity
        made.append(
            Call(
                call.name, who.role, who.stage, parents, call.gap_s, *lengths, call.prompt, chain, call.asked.max_tokens
            )
        )
    klass = next((call.asked.identity.klass for call in listed if call.asked.identity.klass), "")
    return Workflow(name, calls[0].arrived_s, tuple(made), klass)


def _notes(seen: Sequence[_Seen], kept: Sequence[_Seen]) -> Iterable[str]:
    left_out = Counter(call.ending for call in seen if call.ending)
    for ending, count in sorted(left_out.items()):
        yield f"{count} of {len(seen)} calls were {ending} and are left out"
    guessed = sum(call.usage.estimated for call in kept if call.usage)
    if guessed:
        yield f"{guessed} calls have token counts that the gateway estimated"
    if any(call.asked.identity.deadline_s is not None for call in kept):
        yield "deadlines are per call in the journal and are left out"
    yield (
        "a call waits for its named parent, else for the call whose prompt it goes on from, or what that led to, "
        "else for every answered call that nothing had followed; think and tool time is the rest"
    )
    yield (
        f"blocks of {BLOCK_TOKENS} tokens are shared as far as whole pieces of prompts are equal: a message, or "
        f"{PIECE:,} characters of a long one; prompts that part inside a long message are taken to part in the "
        "middle of a piece"
    )
