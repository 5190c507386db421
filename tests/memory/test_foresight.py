"""Paths, wants, worth and order: what the policy believes about the future."""

from outrider.memory import events as ev
from outrider.memory.foresee import told_worth, untold_worth, wait_s
from outrider.memory.paths import Paths
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Settings
from outrider.wants import Want

A, B, C, D, E, F, G, H = (f"{number:032x}" for number in range(8))
SMALL = Settings(4 * 8, 16 * 16, grain_bytes=8, header_bytes=8, disk_read=80.0, disk_write=80.0, recompute=8.0)


def write(policy: Policy, items: tuple[str, ...], now: float, request: int) -> list[ev.Command]:
    """A client prepares and completes a chain of blocks; the disk, if any, writes at once."""
    policy.handle(ev.Prepared(1, request, items, 8), now)
    commands = policy.handle(ev.Completed(1, request + 1, items, (7,) * len(items), False), now)
    return settle(policy, commands, now)


def settle(policy: Policy, commands: list[ev.Command], now: float) -> list[ev.Command]:
    """End every copy well, and those that follow from it; all commands."""
    todo = list(commands)
    seen = list(commands)
    while todo:
        command = todo.pop(0)
        if isinstance(command, ev.Load | ev.Save):
            more = policy.handle(ev.Copied(tuple(copy.number for copy in command.copies)), now)
            todo += more
            seen += more
    return seen


def in_host(policy: Policy, *items: str) -> list[bool]:
    return [policy.residency.state(item, "host") is At.HERE for item in items]


def test_wait_is_the_rest_or_four_times_the_delay() -> None:
    assert wait_s(by_s=30.0, now=10.0) == 20.0
    assert wait_s(by_s=10.0, now=10.0) == 1.0
    assert wait_s(by_s=10.0, now=15.0) == 21.0


def test_a_told_return_and_an_old_touch_weigh_in_one_unit() -> None:
    want = Want("p", "host", by_s=100.0, saved_s=2.0)
    assert told_worth([(want, 10)], now=90.0) > told_worth([(want, 10)], now=0.0) > 0
    assert untold_worth(0.1, idle_s=1.0) > untold_worth(0.1, idle_s=50.0)
    assert told_worth([(want, 10), (Want("q", "host", 91.0, 2.0), 10)], 90.0) == 0.2


def test_a_longer_path_supersedes_its_prefix_and_ends_it_with_itself() -> None:
    paths = Paths(10, 10)
    paths.remember("turn 1", (A, B))
    paths.remember("turn 2", (A, B, C))
    paths.remember("other session", (A, D))
    assert paths.end("turn 2") == [B, C]  # A is held by the other session, B no longer by turn 1
    assert paths.end("other session") == [A, D]


def test_a_want_waits_for_its_path() -> None:
    paths = Paths(10, 10)
    want = Want("later", "host", 5.0, 1.0)
    paths.add_want(want)
    assert not paths.told
    paths.remember("later", (A, B))
    assert list(paths.wants_of(B)) == [(want, 1)]
    assert paths.returned((A,)) == [] and paths.returned((A, B, C)) == [want]
    paths.drop_want("later")
    assert not paths.told and not paths.wants


def test_everything_remembered_is_bounded() -> None:
    paths = Paths(3, 3)
    for number in range(50):
        paths.add_want(Want(f"p{number}", "host", 1.0, 1.0))
        paths.remember(f"p{number}", (f"{number:032x}",))
    assert len(paths.wants) <= 3 and len(paths.told) <= 3
    assert paths.items("p49") and not paths.items("p46")


def test_leaves_leave_before_roots_and_old_before_new() -> None:
    policy = Policy(Settings(4 * 8, grain_bytes=8, recompute=8.0))
    write(policy, (A, B), 10.0, 1)
    write(policy, (C, D), 20.0, 3)
    write(policy, (E,), 30.0, 5)
    assert in_host(policy, A, B, C, D, E) == [True, False, True, True, True]
    write(policy, (F, G), 40.0, 7)
    assert in_host(policy, A, C, D, E, F, G) == [False, True, False, True, True, True]


def test_a_withdrawn_path_leaves_before_everything_else() -> None:
    policy = Policy(Settings(4 * 8, grain_bytes=8, recompute=8.0))
    write(policy, (A, B), 10.0, 1)
    write(policy, (C, D), 20.0, 3)
    policy.handle(ev.Remembered("new", (C, D)), 21.0)
    policy.handle(ev.Withdrawn("new"), 22.0)
    write(policy, (E, F), 30.0, 5)
    assert in_host(policy, A, B, C, D) == [True, True, False, False]


def test_a_wanted_path_is_lifted_in_time_and_counts_as_met() -> None:
    policy = Policy(SMALL)
    write(policy, (A, B), 10.0, 1)
    policy.handle(ev.Remembered("call 1", (A, B)), 10.0)
    write(policy, (C, D, E, F), 20.0, 3)
    assert in_host(policy, A, B) == [False, False]
    commands = policy.handle(ev.Wanted(Want("call 1", "host", by_s=22.0, saved_s=100.0)), 20.5)
    loads = [copy.item for command in commands if isinstance(command, ev.Load) for copy in command.copies]
    assert loads == [A, B]
    settle(policy, commands, 21.0)
    assert in_host(policy, A, B) == [True, True]
    policy.handle(ev.Leased(1, 9, (A, B), 23.0), 22.0)
    assert (policy.tally.wants_met, policy.tally.wants_late, policy.tally.wasted_bytes) == (1, 0, 0)


def test_a_want_without_room_is_kept_and_asked_again() -> None:
    policy = Policy(SMALL)
    write(policy, (A, B), 10.0, 1)
    write(policy, (C, D, E, F), 20.0, 3)
    policy.handle(ev.Leased(2, 1, (C, D, E, F), 21.0), 20.0)
    policy.handle(ev.Remembered("p", (A, B)), 20.0)
    commands = policy.handle(ev.Wanted(Want("p", "host", by_s=30.0, saved_s=100.0)), 20.0)
    assert not any(isinstance(command, ev.Load) for command in commands)
    wakes = [command.at_s for command in commands if isinstance(command, ev.Wake)]
    assert wakes and 20.0 < wakes[-1] < 30.0, "it must be looked at before its deadline"
    commands = policy.handle(ev.Released(2, 1), 21.0)
    assert any(isinstance(command, ev.Load) for command in commands)


def test_a_want_that_would_be_late_is_not_sent_before_its_deadline() -> None:
    policy = Policy(SMALL)
    write(policy, (A, B), 10.0, 1)
    policy.handle(ev.Remembered("p", (A, B)), 10.0)
    write(policy, (C, D, E, F), 20.0, 3)
    commands = policy.handle(ev.Wanted(Want("p", "host", by_s=20.05, saved_s=100.0)), 20.0)
    assert not any(isinstance(command, ev.Load) for command in commands)
    commands = policy.handle(ev.Woke(), 20.05)  # overdue: now better late than by the engine's own lease
    assert any(isinstance(command, ev.Load) for command in commands)


def test_leases_join_one_copy_and_a_cancelled_copy_is_wanted_again() -> None:
    policy = Policy(SMALL)
    write(policy, (A,), 10.0, 1)
    write(policy, (C, D, E, F), 20.0, 3)
    first = policy.handle(ev.Leased(1, 10, (A,), 25.0), 21.0)
    (load,) = [command for command in first if isinstance(command, ev.Load)]
    assert not any(isinstance(command, ev.Load) for command in policy.handle(ev.Leased(2, 1, (A,), 25.0), 21.0))
    policy.handle(ev.Left(1), 21.1)
    assert policy.residency.state(A, "host") is At.COMING  # client 2 still waits
    policy.handle(ev.Left(2), 21.2)
    assert policy.residency.state(A, "host") is At.UNWANTED
    assert not any(isinstance(command, ev.Load) for command in policy.handle(ev.Leased(3, 1, (A,), 25.0), 21.3))
    assert policy.residency.state(A, "host") is At.COMING
    commands = policy.handle(ev.Copied((load.copies[0].number,)), 21.4)
    assert [command for command in commands if isinstance(command, ev.Grant)] == [
        ev.Grant(3, 1, (ev.Span(load.copies[0].dst_at, 8),), {"disk": 1})
    ]


def test_a_copy_that_nobody_wants_any_more_gives_its_room_back_when_it_ends() -> None:
    policy = Policy(SMALL)
    write(policy, (A,), 10.0, 1)
    write(policy, (C, D, E, F), 20.0, 3)
    (load,) = [c for c in policy.handle(ev.Leased(1, 10, (A,), 25.0), 21.0) if isinstance(c, ev.Load)]
    policy.handle(ev.Left(1), 21.1)
    used_bytes = policy.residency.ledger.used_bytes["host"]
    policy.handle(ev.Copied((load.copies[0].number,)), 21.4)
    assert policy.residency.state(A, "host") is At.ABSENT and policy.residency.state(A, "disk") is At.HERE
    assert policy.residency.ledger.used_bytes["host"] == used_bytes - 8
