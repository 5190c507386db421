"""Corners of the policy that a random walk seldom turns: waiting for room, a disk that refuses, unpayable debts."""

from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Settings

A, B, C, D, E, F = (f"{number:032x}" for number in range(6))


def recovered(*items: str, host_blocks: int = 2, disk_blocks: int = 4, retry_s: float = 2.0) -> Policy:
    """A policy with these blocks of 8 bytes on disk and nothing in host."""
    settings = Settings(host_blocks * 8, disk_blocks * 16, grain_bytes=8, header_bytes=8, retry_s=retry_s)
    policy = Policy(settings)
    found = tuple(ev.Found(item, at * 16, 8, 100 + at, at + 1) for at, item in enumerate(items))
    assert policy.handle(ev.Recovered(found), 1.0) == []
    return policy


def of(kind: type, commands: list[ev.Command]) -> list[ev.Command]:
    return [command for command in commands if isinstance(command, kind)]


def write(policy: Policy, client: int, items: tuple[str, ...], now: float, durable: bool = False) -> list[ev.Command]:
    policy.handle(ev.Prepared(client, 900, items, 8), now)
    return policy.handle(ev.Completed(client, 901, items, (7,) * len(items), durable), now)


def test_a_block_that_a_lease_waits_for_does_not_leave_the_disk() -> None:
    """Host is held by client 1, so client 2's load waits; client 1's saves need the disk's last slots meanwhile."""
    policy = recovered(A, host_blocks=2, disk_blocks=2)
    commands = write(policy, 1, (B, C), 2.0)
    assert len(of(ev.Save, commands)) == 1
    policy.handle(ev.Leased(1, 1, (B, C), 9.0), 2.0)
    assert of(ev.Grant, policy.handle(ev.Leased(2, 1, (A,), 9.0), 2.1)) == []
    (save,) = of(ev.Save, commands)
    assert isinstance(save, ev.Save)
    policy.handle(ev.Copied(tuple(copy.number for copy in save.copies)), 3.0)
    policy.handle(ev.Leased(1, 3, (B,), 9.0), 3.2)
    (save,) = of(ev.Save, policy.handle(ev.Flushed(1, 2), 3.5))  # C must be saved: B leaves for it, though A is older
    assert isinstance(save, ev.Save) and [copy.item for copy in save.copies] == [C]
    assert [policy.residency.state(item, "disk") is At.HERE for item in (A, B)] == [True, False]
    assert of(ev.Load, policy.handle(ev.Released(1, 3), 3.9)) == []
    (load,) = of(ev.Load, policy.handle(ev.Released(1, 1), 4.0))
    assert isinstance(load, ev.Load) and load.copies[0].item == A


def test_a_disk_that_refused_is_left_alone_for_a_while() -> None:
    policy = recovered(host_blocks=4, retry_s=2.0)
    (save,) = of(ev.Save, write(policy, 1, (A,), 2.0))
    assert isinstance(save, ev.Save)
    commands = policy.handle(ev.CopyFailed(save.copies[0].number, "ENOSPC"), 3.0)
    assert of(ev.Save, commands) == [] and of(ev.Wake, commands) == [ev.Wake(5.0)]
    assert of(ev.Save, write(policy, 1, (B,), 4.0)) == []
    (again,) = of(ev.Save, policy.handle(ev.Woke(), 5.0))
    assert isinstance(again, ev.Save) and {copy.item for copy in again.copies} == {A, B}


def test_a_failed_save_answers_whoever_waited_for_it() -> None:
    policy = recovered(host_blocks=4)
    (save,) = of(ev.Save, write(policy, 1, (A, B), 2.0, durable=True))
    assert isinstance(save, ev.Save)
    policy.handle(ev.Copied((save.copies[1].number,)), 3.0)
    answer = policy.handle(ev.CopyFailed(save.copies[0].number, "EIO"), 3.0)
    assert of(ev.Acknowledge, answer) == [ev.Acknowledge(1, 901, (A,))]
    assert policy.lookup((A, B)) == 2  # both are still in host


def test_a_flush_waits_for_what_is_unsaved_and_for_nothing_else() -> None:
    policy = recovered(host_blocks=4)
    assert of(ev.Acknowledge, policy.handle(ev.Flushed(1, 5), 1.5)) == [ev.Acknowledge(1, 5)]
    (save,) = of(ev.Save, write(policy, 1, (A,), 2.0))
    assert isinstance(save, ev.Save)
    assert of(ev.Acknowledge, policy.handle(ev.Flushed(1, 6), 2.5)) == []
    policy.handle(ev.Prepared(1, 7, (B,), 8), 2.6)  # a draft is not published: not its business
    assert of(ev.Acknowledge, policy.handle(ev.Copied((save.copies[0].number,)), 3.0)) == [ev.Acknowledge(1, 6)]


def test_a_flush_saves_again_what_the_disk_had_to_drop() -> None:
    policy = recovered(host_blocks=4, disk_blocks=1)
    for now, item in ((2.0, A), (9.0, B)):
        (save,) = of(ev.Save, write(policy, 1, (item,), now))
        assert isinstance(save, ev.Save)
        policy.handle(ev.Copied((save.copies[0].number,)), now)
    assert policy.residency.state(A, "disk") is At.ABSENT and policy.residency.state(A, "host") is At.HERE
    (save,) = of(ev.Save, policy.handle(ev.Flushed(1, 9), 10.0))
    assert isinstance(save, ev.Save) and save.copies[0].item == A
    answer = policy.handle(ev.Copied((save.copies[0].number,)), 11.0)
    assert of(ev.Acknowledge, answer) == [ev.Acknowledge(1, 9, (B,))]  # one slot: B left for A, and that is said


def test_a_lease_larger_than_host_is_answered_with_its_head() -> None:
    policy = recovered(A, B, C, host_blocks=2)
    (load,) = of(ev.Load, policy.handle(ev.Leased(1, 1, (A, B, C), 50.0), 2.0))
    assert isinstance(load, ev.Load) and [copy.item for copy in load.copies] == [A, B]
    (grant,) = of(ev.Grant, policy.handle(ev.Copied(tuple(copy.number for copy in load.copies)), 3.0))
    assert isinstance(grant, ev.Grant) and [span is not None for span in grant.spans] == [True, True, False]


def test_two_leases_that_fill_host_between_them_do_not_wait_for_each_other() -> None:
    policy = recovered(A, B, C, D, host_blocks=2)
    first = of(ev.Load, policy.handle(ev.Leased(1, 1, (A, B), 50.0), 2.0))
    policy.handle(ev.Leased(2, 1, (C, D), 50.0), 2.0)
    assert isinstance(first[0], ev.Load)
    commands = policy.handle(ev.Copied(tuple(copy.number for copy in first[0].copies)), 3.0)
    assert [grant.client for grant in of(ev.Grant, commands)] == [1]  # type: ignore[union-attr]
    commands = policy.handle(ev.Released(1, 1), 4.0)
    assert len(of(ev.Load, commands)) == 1


def test_a_request_number_used_twice_is_refused() -> None:
    policy = recovered(A)
    policy.handle(ev.Leased(1, 1, (A,), 9.0), 2.0)
    (refusal,) = of(ev.Refuse, policy.handle(ev.Leased(1, 1, (A,), 9.0), 2.0))
    assert isinstance(refusal, ev.Refuse) and "is open" in refusal.why


def test_overlapping_records_keep_the_newer_block() -> None:
    """The erasure of an older, larger block was lost: its place belongs to the newer one."""
    policy = Policy(Settings(64, 64, grain_bytes=8, header_bytes=8))
    found = (ev.Found(A, 0, 16, 1, 1), ev.Found(B, 8, 8, 2, 2), ev.Found(C, 24, 8, 3, 3), ev.Found(D, 60, 8, 4, 4))
    assert policy.handle(ev.Recovered(found), 1.0) == [ev.Erase((D, A))]
    assert policy.lookup((B, C)) == 2 and policy.tally.recovered_blocks == 2


def test_a_load_that_fails_answers_with_a_hole_and_forgets_the_block() -> None:
    policy = recovered(A, B)
    (load,) = of(ev.Load, policy.handle(ev.Leased(1, 1, (A, B), 50.0), 2.0))
    assert isinstance(load, ev.Load)
    policy.handle(ev.Copied((load.copies[1].number,)), 3.0)
    commands = policy.handle(ev.CopyFailed(load.copies[0].number, "checksum"), 3.0)
    (grant,) = of(ev.Grant, commands)
    assert isinstance(grant, ev.Grant) and [span is None for span in grant.spans] == [True, False]
    assert of(ev.Erase, commands) == [ev.Erase((A,))] and policy.lookup((A,)) == 0
    assert policy.stats()["checksum_failures"] == 1
