"""The policy on a virtual clock: laws 8 and 9, credits, reservations, order, routing and wants, without a socket."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.agents.events import (
    Abort,
    Arrived,
    Break,
    Call,
    Command,
    Dispatch,
    EngineDown,
    EngineUp,
    Event,
    Failed,
    Finished,
    FirstByte,
    Gone,
    Hold,
    Identity,
    Link,
    Reject,
    Relay,
    Settle,
    Tell,
    Terminal,
    Usage,
    Wake,
    Woke,
)
from outrider.agents.policy import Policy
from outrider.agents.settings import Foresight, GatewaySettings, Limits
from outrider.errors import LawBroken

A, B = "http://a:1", "http://b:1"


def make(**options: Any) -> Policy:
    policy = Policy(GatewaySettings(engines=options.pop("engines", (A, B)), **options))
    for name in policy.engines:
        policy.handle(EngineUp(name), 0.0)
    return policy


def call(name: str, workflow: str = "", chain: str = "", chars: int = 400, **options: Any) -> Call:
    """A call whose prompt is one piece of `chars` characters per letter of `chain`."""
    links = tuple(Link(f"d-{chain[: at + 1]}", chars) for at in range(len(chain)))
    fields = {name: options.pop(name) for name in tuple(options) if name in Identity.__struct_fields__}
    identity = Identity(workflow=workflow or name, **fields)
    whole = sum(link.chars for link in links) or chars
    return Call(name, identity, "/v1/completions", chars=whole, chain=links, stream=True, **options)


def done(name: str, attempt: int = 1, prompt: int = 100, output: int = 10, cached: int = 0) -> Finished:
    return Finished(name, attempt, 200, Usage(prompt, output, cached, estimated=False))


def starts(commands: Iterable[Command]) -> list[tuple[str, str]]:
    return [(c.call, c.engine) for c in commands if isinstance(c, Dispatch)]


def only(commands: list[Command], kind: type) -> Any:
    (found,) = (c for c in commands if isinstance(c, kind))
    return found


# -- law 9 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["residency", "sticky"])
@pytest.mark.parametrize("older", [0, 2])
def test_no_workflow_starves_behind_ever_new_short_ones(routing: str, older: int) -> None:
    """One long call with `older` long ones before it, against short ones that never stop: the stated bound, exactly."""
    every = 5
    policy = make(engines=(A,), credit=1, oldest_share_every=every, routing=routing, queue_limit=100_000)
    clock = 0.0
    running = starts(policy.handle(Arrived(call("first", max_tokens=1)), clock))[0][0]
    for at in range(older + 1):
        policy.handle(Arrived(call(f"long-{at}", chars=100_000, max_tokens=4000)), clock)
    seen: list[str] = []
    for at in range(10_000):
        clock += 1.0
        policy.handle(Arrived(call(f"short-{2 * at}", max_tokens=1, final=True)), clock)
        policy.handle(Arrived(call(f"short-{2 * at + 1}", max_tokens=1, final=True)), clock)
        running = starts(policy.handle(done(running, output=1), clock))[0][0]
        seen.append(running)
        if running == f"long-{older}":
            break
    assert running == f"long-{older}"
    assert len(seen) <= every * (older + 1)
    assert len(seen) > every * older, "and the short ones did go first in between"


def test_the_oldest_gets_its_turn_even_when_it_needs_the_whole_engine() -> None:
    """Law 9 under a KV bound: at the oldest's turn the engine drains until it fits; small calls don't slip past."""
    policy = make(engines=(A,), credit=4, oldest_share_every=3, foresight=Foresight(kv_tokens=1000))
    policy.handle(Arrived(call("s0", chars=400, max_tokens=100)), 0.0)
    policy.handle(Arrived(call("big", chars=3600, max_tokens=100)), 0.0)
    running, order, clock = ["s0"], ["s0"], 0.0
    for at in range(1, 30):
        clock += 1.0
        began = starts(policy.handle(Arrived(call(f"s{at}", chars=400, max_tokens=100, final=True)), clock))
        if running:
            began += starts(policy.handle(done(running.pop(0), output=50), clock))
        running += [name for name, _ in began]
        order += [name for name, _ in began]
        policy.check()
        assert policy.engines[A].reserved_tokens <= 1000 or len(policy.engines[A].running) == 1
    assert order.index("big") <= 3


# -- order ------------------------------------------------------------------------------------------------------------


def run_all(policy: Policy, names: list[str], clock: float = 1.0) -> list[str]:
    """Finish whatever runs until nothing is left; the order of starts."""
    order: list[str] = []
    running = [name for engine in policy.engines.values() for name in engine.running]
    while running:
        clock += 1.0
        began = starts(policy.handle(done(running.pop(0)), clock))
        order += [name for name, _ in began]
        running += [name for name, _ in began]
    return [name for name in order if name in names]


def test_fcfs_is_by_arrival_and_srtf_by_remaining_work() -> None:
    sizes = {"long": 2000, "short": 5, "middle": 50}
    for policy_name, wanted in (("fcfs", ["long", "short", "middle"]), ("srtf", ["short", "middle", "long"])):
        policy = make(engines=(A,), credit=1, policy=policy_name)
        policy.handle(Arrived(call("busy")), 0.0)
        for name, size in sizes.items():
            policy.handle(Arrived(call(name, max_tokens=size)), 0.0)
        assert run_all(policy, list(sizes)) == wanted


def test_remaining_work_is_learned_from_whole_workflows() -> None:
    """A planner's call is short, but much follows it; a summariser's is long and the last: it goes first."""
    policy = make(engines=(A,), credit=1, foresight=Foresight(prior_calls=1.0))
    clock = 0.0
    for run in range(3):
        for role, output in (("planner", 5), ("coder", 400), ("coder", 400), ("summariser", 50)):
            clock += 10.0
            name = f"{run}-{role}-{clock}"
            policy.handle(Arrived(call(name, f"wf-{run}", role=role, final=role == "summariser")), clock)
            policy.handle(done(name, output=output), clock + 5.0)
    policy.handle(Arrived(call("busy", role="other")), clock)
    plan = only(policy.handle(Arrived(call("plan", "x", role="planner")), clock), Hold)
    summary = only(policy.handle(Arrived(call("sum", "y", role="summariser")), clock), Hold)
    assert plan.remaining_s > 3 * summary.remaining_s
    assert run_all(policy, ["plan", "sum"], clock) == ["sum", "plan"]


def test_batch_yields_and_siblings_move_together() -> None:
    policy = make(engines=(A,), credit=1)
    policy.handle(Arrived(call("busy")), 0.0)
    policy.handle(Arrived(call("bulk", max_tokens=1, klass="batch")), 0.0)
    policy.handle(Arrived(call("child-1", "w", max_tokens=10, parent="p")), 0.0)
    policy.handle(Arrived(call("other", max_tokens=100)), 0.0)
    policy.handle(Arrived(call("child-2", "w", max_tokens=900, parent="p")), 0.0)
    assert run_all(policy, ["bulk", "child-1", "other", "child-2"]) == ["child-1", "child-2", "other", "bulk"]


# -- where ------------------------------------------------------------------------------------------------------------


def test_a_returning_context_goes_where_its_prefix_is() -> None:
    policy = make()
    assert starts(policy.handle(Arrived(call("x1", "x", "abc")), 0.0)) == [("x1", A)]
    assert starts(policy.handle(Arrived(call("y1", "y", "qrs")), 0.0)) == [("y1", B)], "the idle one"
    policy.handle(done("x1"), 1.0)
    policy.handle(done("y1"), 1.0)
    assert starts(policy.handle(Arrived(call("y2", "y", "qrstu")), 2.0)) == [("y2", B)]
    assert starts(policy.handle(Arrived(call("x2", "x", "abcde")), 2.0)) == [("x2", A)]


def test_a_prefix_is_left_behind_when_waiting_costs_more() -> None:
    """In seconds: 100 tokens of prefill are not worth waiting behind 10,000."""
    policy = make(credit=1)
    policy.handle(Arrived(call("x1", "x", "a")), 0.0)
    policy.handle(done("x1"), 1.0)
    policy.handle(Arrived(call("big", "big", "z", chars=40_000)), 2.0)
    went = dict(starts(policy.handle(Arrived(call("x2", "x", "ab")), 2.0)))
    busy = next(name for name, engine in policy.engines.items() if "big" in engine.running)
    assert went["x2"] != busy


def test_a_full_engine_is_waited_for_only_while_that_pays() -> None:
    """Its prefix is worth 4 s; the engine is soon free: the call waits, then starts there, though the other is idle."""
    policy = make(credit=1, foresight=Foresight(prior_output_tokens=10))
    policy.handle(Arrived(call("x1", "x", "a", chars=16_000, max_tokens=10)), 0.0)
    policy.handle(done("x1", prompt=4000), 1.0)
    policy.handle(Arrived(call("short", "s", "a", chars=16_000, max_tokens=10)), 2.0)  # shares the prefix, runs on A
    held = policy.handle(Arrived(call("x2", "x", "ab", chars=16_000, max_tokens=10)), 2.0)
    assert only(held, Hold).free_credit == {A: 0, B: 1}
    assert starts(policy.handle(done("short", prompt=4000), 2.1)) == [("x2", A)]
    assert policy.engines[B].starts == 0


def test_a_herd_of_arrivals_spreads() -> None:
    """1,000 calls at once with no news from any engine between them: load is counted when it is decided."""
    policy = make(engines=tuple(f"http://e{i}:1" for i in range(4)), credit=250, queue_limit=1000)
    for at in range(1000):
        policy.handle(Arrived(call(f"c{at}")), 0.0)
    assert {engine.starts for engine in policy.engines.values()} == {250}


def test_sticky_keeps_a_workflow_on_one_engine_and_moves_few_when_one_goes() -> None:
    engines = tuple(f"http://e{i}:1" for i in range(4))
    policy = make(engines=engines, routing="sticky", credit=1000, queue_limit=1000)

    def homes(tag: str) -> dict[str, str]:
        found = {}
        for at in range(200):
            name = f"{tag}-{at}"
            found[f"wf-{at}"] = starts(policy.handle(Arrived(call(name, f"wf-{at}")), 0.0))[0][1]
            policy.handle(done(name), 0.0)
        return found

    first, second = homes("a"), homes("b")
    assert first == second
    assert min(list(first.values()).count(engine) for engine in engines) > 20
    policy.handle(EngineDown(engines[0], "gone", refused=True), 0.0)
    third = homes("c")
    assert all(third[wf] == home for wf, home in first.items() if home != engines[0])
    assert engines[0] not in third.values()


def test_a_remembered_prefix_counts_as_loadable_only_with_memory() -> None:
    for attached in (False, True):
        policy = make(memory_attached=attached)
        policy.handle(Arrived(call("x1", "x", "abc", chars=4000)), 0.0)
        policy.handle(done("x1", prompt=3000), 1.0)
        policy.handle(EngineDown(A, "gone", refused=True), 2.0)
        dispatch = only(policy.handle(Arrived(call("x2", "x", "abcd", chars=4000)), 3.0), Dispatch)
        (score,) = dispatch.scores
        assert score.engine == B
        assert score.resident_tokens == 0
        assert (score.load_s > 0) == attached
        assert score.prefill_s < 2.0 if attached else score.prefill_s > 3.0


# -- endings ----------------------------------------------------------------------------------------------------------


def test_what_a_failure_leads_to() -> None:
    policy = make(engines=(A, B), limits=Limits(attempts=2))
    policy.handle(Arrived(call("x")), 0.0)
    assert starts(policy.handle(Failed("x", 1, "reset", "", started=False), 1.0)) == [("x", B)]
    assert only(policy.handle(Failed("x", 2, "reset", "", started=False), 2.0), Reject).status == 502
    policy.handle(Arrived(call("y")), 3.0)
    assert isinstance(policy.handle(Failed("y", 1, "reset", "", started=True), 3.0)[0], Break)
    policy.handle(Arrived(call("z")), 4.0)
    assert only(policy.handle(Failed("z", 1, "timeout", "", started=False), 4.0), Reject).status == 504
    policy.handle(Arrived(call("w")), 5.0)
    assert starts(policy.handle(Failed("w", 1, "status", "status 500", started=False), 5.0)) == [("w", B)]
    assert isinstance(policy.handle(Failed("w", 2, "status", "status 500", started=False), 5.0)[0], Relay)
    policy.check()


def test_late_news_of_an_attempt_that_is_over_is_dropped() -> None:
    """A duplicate completion from an engine that was given up is never sent (law 8)."""
    policy = make()
    policy.handle(Arrived(call("x")), 0.0)
    policy.handle(Failed("x", 1, "reset", "", started=False), 1.0)
    for event in (done("x", attempt=1), Failed("x", 1, "reset", "", started=True), FirstByte("x", 1), Gone("never")):
        assert not [c for c in policy.handle(event, 2.0) if isinstance(c, Terminal)]
    assert isinstance(policy.handle(done("x", attempt=2), 3.0)[0], Settle)
    assert policy.handle(Gone("x"), 4.0) == []
    policy.handle(Arrived(call("y")), 5.0)
    with pytest.raises(LawBroken, match="arrived twice"):
        policy.handle(Arrived(call("y")), 5.0)


def test_a_line_is_bounded_and_calls_in_it_are_given_up_in_time() -> None:
    policy = make(engines=(A,), credit=1, queue_limit=2, limits=Limits(total_s=10.0, no_engine_s=3.0))
    policy.handle(Arrived(call("running")), 0.0)
    policy.handle(Arrived(call("w1")), 1.0)
    policy.handle(Arrived(call("w2")), 2.0)
    refused = only(policy.handle(Arrived(call("w3")), 2.0), Reject)
    assert refused.status == 429
    assert 1 <= (refused.retry_after_s or 0) <= 60
    assert policy.wake_at_s == 11.0
    expired = policy.handle(Woke(), 11.0)
    assert (only(expired, Reject).call, only(expired, Reject).status, only(expired, Wake).at_s) == ("w1", 504, 12.0)
    lost = policy.handle(EngineDown(A, "gone", refused=True), 11.5)
    assert lost == [], "the timer at 12 comes first"
    assert only(policy.handle(Woke(), 12.0), Reject).status == 503, "no engine lives any more"


def test_a_slow_probe_is_no_death_but_three_are() -> None:
    policy = make(engines=(A,))
    for _ in range(2):
        policy.handle(EngineDown(A, "slow", refused=False), 0.0)
    assert policy.engines[A].alive
    policy.handle(EngineUp(A), 0.0)
    for _ in range(3):
        policy.handle(EngineDown(A, "slow", refused=False), 0.0)
    assert not policy.engines[A].alive


# -- wants ------------------------------------------------------------------------------------------------------------


def test_wants_foresee_the_next_turn_and_end_with_the_workflow() -> None:
    """Each answer wants its context back when turns of this role usually follow; the next answer takes it over."""
    policy = make(memory_attached=True, foresight=Foresight(prior_gap_s=5.0))
    clock, chain, told = 100.0, "ab", []
    for turn in range(6):
        policy.handle(Arrived(call(f"t{turn}", "w", chain, role="coder", final=turn == 5)), clock)
        clock += 1.0
        commands = policy.handle(done(f"t{turn}"), clock)
        told.append([c.want for c in commands if isinstance(c, Tell)])
        chain += "cdefghijklmnop"[2 * turn : 2 * turn + 2]
        clock += 20.0
    first = told[0][0]
    assert (first.item, first.place, first.by_s) == ("t0", "host", 106.0), "the prior gap"
    assert [(want.item, want.saved_s > 0) for want in told[1]] == [("t0", False), ("t1", True)]
    assert told[4][1].by_s == pytest.approx(clock - 42.0 + 1.0 + 20.0), "the learned gap"
    assert told[4][1].saved_s > told[0][0].saved_s, "surer that it returns"
    assert [(want.item, want.saved_s) for want in told[5]] == [("t4", 0.0)], "final: nothing new, the last withdrawn"


def test_without_memory_nothing_is_wanted() -> None:
    policy = make()
    policy.handle(Arrived(call("x", "w", "ab")), 0.0)
    assert not [c for c in policy.handle(done("x"), 1.0) if isinstance(c, Tell)]


def test_contexts_that_never_return_are_soon_not_wanted() -> None:
    policy = make(memory_attached=True)
    wanted = []
    for run in range(60):
        policy.handle(Arrived(call(f"p{run}", f"w{run}", f"{chr(65 + run)}", role="planner")), float(run))
        wanted.append(any(isinstance(c, Tell) for c in policy.handle(done(f"p{run}"), float(run))))
        policy.handle(Arrived(call(f"s{run}", f"w{run}", f"{chr(165 + run)}", role="sum", final=True)), float(run))
        policy.handle(done(f"s{run}"), float(run))
    assert wanted[0]
    assert not wanted[-1]


def test_a_nameless_conversation_is_recognised_by_its_prefix() -> None:
    policy = make(memory_attached=True)
    first = Call("c1", Identity(), "/v1/completions", chars=800, chain=(Link("1", 400), Link("2", 400)))
    policy.handle(Arrived(first), 0.0)
    policy.handle(done("c1"), 1.0)
    chain = (*first.chain, Link("3", 400))
    policy.handle(Arrived(Call("c2", Identity(), "/v1/completions", chars=1200, chain=chain)), 2.0)
    told = [c.want for c in policy.handle(done("c2"), 3.0) if isinstance(c, Tell)]
    assert [(want.item, want.saved_s > 0) for want in told] == [("c1", False), ("c2", True)]
    assert len(policy.workflows) == 1


def test_what_clients_invent_is_bounded() -> None:
    """Roles, stages and workflows by the thousand: the state stays within its settings."""
    policy = make(engines=(A,), memory_attached=True, foresight=Foresight(roles=16, workflows=8))
    for at in range(500):
        policy.handle(
            Arrived(call(f"c{at}", f"w{at}", "abc"[: 1 + at % 3], role=f"r{at}", stage=f"s{at}/1")), float(at)
        )
        policy.handle(done(f"c{at}"), at + 0.5)
    assert len(policy.workflows) == 8
    assert len(policy.lengths.histories) == 16
    assert len(policy.workflows.remaining.histories) <= 16


# -- law 8 under any sequence -----------------------------------------------------------------------------------------


class Everything(RuleBasedStateMachine):
    """Any order of arrivals, endings, deaths, departures and time: one terminal command each, all books balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.policy = Policy(
            GatewaySettings(
                engines=(A, B),
                credit=2,
                queue_limit=4,
                memory_attached=True,
                routing=self.ROUTING,
                oldest_share_every=3,
                limits=Limits(total_s=30.0, no_engine_s=5.0, attempts=2),
                foresight=Foresight(kv_tokens=3000, workflows=4, roles=4),
            )
        )
        self.arrived: list[str] = []
        self.ended: dict[str, Command] = {}
        self.running: dict[str, Dispatch] = {}
        self.timers: list[float] = []
        self.wanted: dict[str, bool] = {}

    ROUTING: Any = "residency"

    def feed(self, event: Event) -> None:
        for command in self.policy.handle(event, self.now):
            match command:
                case Dispatch(name):
                    assert name not in self.ended
                    assert self.policy.engines[command.engine].alive
                    assert command.bound_tokens >= command.predicted_tokens >= 1
                    self.running[name] = command
                case Wake(at_s):
                    self.timers.append(at_s)
                case Tell(want):
                    self.wanted[want.item] = want.saved_s > 0
                case Hold():
                    assert command.position == len(command.ahead) + 1 or len(command.ahead) == 8
                case _:
                    assert command.call in self.arrived
                    assert command.call not in self.ended, f"{command} after {self.ended[command.call]}"
                    self.ended[command.call] = command
                    self.running.pop(command.call, None)

    @rule(
        workflow=st.sampled_from(["", "w1", "w2", "w3"]),
        role=st.sampled_from(["", "coder", "reviewer"]),
        chain=st.text("ab", max_size=4),
        limit=st.sampled_from([None, 1, 50, 5000]),
        final=st.booleans(),
        parent=st.sampled_from(["", "p"]),
    )
    def arrive(self, workflow: str, role: str, chain: str, limit: int | None, final: bool, parent: str) -> None:
        name = f"c{len(self.arrived)}"
        self.arrived.append(name)
        identity = Identity(workflow, role, stage=f"{role}/1", parent=parent, final=final)
        links = tuple(Link(f"d{chain[: at + 1]}", 500) for at in range(len(chain)))
        self.feed(
            Arrived(Call(name, identity, "/v1/completions", chars=500 * len(chain), max_tokens=limit, chain=links))
        )

    @precondition(lambda self: self.running)
    @rule(
        pick=st.integers(0, 7), output=st.integers(0, 400), status=st.sampled_from([200, 200, 400]), blind=st.booleans()
    )
    def finish(self, pick: int, output: int, status: int, blind: bool) -> None:
        dispatch = self.pick(pick)
        self.feed(FirstByte(dispatch.call, dispatch.attempt))
        self.now += 0.5
        usage = None if blind else Usage(100, output, 10, 0, estimated=False)
        self.feed(Finished(dispatch.call, dispatch.attempt, status, usage))
        assert isinstance(self.ended[dispatch.call], Settle)

    @precondition(lambda self: self.running)
    @rule(
        pick=st.integers(0, 7), kind=st.sampled_from(["refused", "reset", "timeout", "status"]), started=st.booleans()
    )
    def fail(self, pick: int, kind: str, started: bool) -> None:
        dispatch = self.pick(pick)
        del self.running[dispatch.call]
        self.feed(Failed(dispatch.call, dispatch.attempt, kind, "why", started and kind in ("reset", "timeout")))

    @precondition(lambda self: self.arrived)
    @rule(pick=st.integers(0, 100))
    def leave(self, pick: int) -> None:
        name = self.arrived[pick % len(self.arrived)]
        self.feed(Gone(name))
        assert name in self.ended

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 7))
    def echo_from_the_grave(self, pick: int) -> None:
        dispatch = self.pick(pick)
        self.feed(done(dispatch.call, dispatch.attempt - 1))
        assert dispatch.call in self.running

    @rule(name=st.sampled_from([A, B]), kv=st.sampled_from([None, 3000]))
    def up(self, name: str, kv: int | None) -> None:
        self.feed(EngineUp(name, kv_tokens=kv))

    @rule(name=st.sampled_from([A, B]), refused=st.booleans())
    def down(self, name: str, refused: bool) -> None:
        self.feed(EngineDown(name, "why", refused))

    @rule(seconds=st.sampled_from([0.1, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers and min(self.timers) <= until:
            self.timers.sort()
            self.now = max(self.now, self.timers.pop(0))
            self.feed(Woke())
        self.now = until

    def pick(self, index: int) -> Dispatch:
        return list(self.running.values())[index % len(self.running)]

    @invariant()
    def books_are_balanced(self) -> None:
        self.policy.check()
        assert sorted(self.running) == sorted(self.policy.at)
        waiting = [w.call.id for w in self.policy.line.by_age()]
        assert sorted([*waiting, *self.running, *self.ended]) == sorted(self.arrived)
        for engine in self.policy.engines.values():
            assert engine.reserved_tokens <= 3000 or len(engine.running) == 1
            assert engine.prefixes.held_tokens <= engine.prefixes.capacity_tokens

    @invariant()
    def nothing_waits_that_could_run(self) -> None:
        idle = all(not engine.running for engine in self.policy.engines.values())
        alive = any(engine.alive for engine in self.policy.engines.values())
        assert not (len(self.policy.line) and idle and alive), "work conserving: an idle live engine, and calls wait"

    def teardown(self) -> None:
        """Everybody gets an answer in the end."""
        self.now += 1.0
        self.feed(EngineUp(A))
        self.feed(EngineUp(B))
        while self.running:
            dispatch = self.pick(0)
            self.feed(done(dispatch.call, dispatch.attempt))
        assert sorted(self.ended) == sorted(self.arrived)
        assert all(isinstance(end, Settle | Reject | Relay | Break | Abort) for end in self.ended.values())


class EverythingSticky(Everything):
    ROUTING = "sticky"


bounds = hypothesis_settings(max_examples=120, stateful_step_count=40, deadline=None)
TestEverything = Everything.TestCase
TestEverything.settings = bounds
TestEverythingSticky = EverythingSticky.TestCase
TestEverythingSticky.settings = bounds


def test_outstanding_work_is_not_remembered_past_a_change() -> None:
    """At one moment, as on a virtual clock: a start, a first byte and an ending change what a newcomer waits for."""
    policy = make(engines=(A,), credit=4)
    engine = policy.engines[A]
    seen = [engine.outstanding_s(1.0)]
    events = (Arrived(call("one", chars=4000)), Arrived(call("two", chars=4000)), FirstByte("one", 1), done("one"))
    for event in events:
        policy.handle(event, 1.0)
        seen.append(engine.outstanding_s(1.0))
    nothing, one, two, begun, left = seen
    assert nothing == 0.0 < one < two
    assert left < begun < two
    prefill_s, decode_s = engine.running["two"].left_s(1.0)
    assert left == prefill_s + decode_s / 4
