"""What the policy does with a hybrid tier: near wants to host, far ones to the device's cache, damage never twice."""

from outrider.memory import events as ev
from outrider.memory.policy import Policy
from outrider.memory.residency import At
from outrider.memory.settings import Hybrid, Settings
from outrider.wants import Want

A, B, C, D, E, F = (f"{number:032x}" for number in range(6))
DEVICE = Hybrid(16 * 16, cache_bytes=32, line_bytes=16, read=80.0, hit_read=800.0, write=80.0)


def small(host_blocks: int = 2, disk_blocks: int = 0, device: Hybrid = DEVICE) -> Policy:
    """Blocks of 8 bytes, room for some in host, for two in the device's cache."""
    return Policy(
        Settings(
            host_blocks * 8, disk_blocks * 16, grain_bytes=8, header_bytes=8, disk_read=80.0, disk_write=80.0,
            recompute=8.0, hybrid=device,
        )
    )  # fmt: skip


def of(kind: type, commands: list[ev.Command]) -> list[ev.Command]:
    return [command for command in commands if isinstance(command, kind)]


def numbers(*commands: ev.Command) -> tuple[int, ...]:
    return tuple(copy.number for c in commands if isinstance(c, ev.Load | ev.Save | ev.Prefetch) for copy in c.copies)


def items(*commands: ev.Command) -> list[str]:
    return [copy.item for c in commands if isinstance(c, ev.Load | ev.Save | ev.Prefetch) for copy in c.copies]


def wake_s(commands: list[ev.Command]) -> float:
    return next(command.at_s for command in commands if isinstance(command, ev.Wake))


def write(policy: Policy, names: tuple[str, ...], now: float, settle: bool = True) -> list[ev.Command]:
    """A client writes blocks one by one; each is saved below host before the next."""
    seen: list[ev.Command] = []
    for name in names:
        policy.handle(ev.Prepared(1, 900, (name,), 8), now)
        commands = policy.handle(ev.Completed(1, 901, (name,), (7,), False), now)
        while settle and numbers(*commands):
            seen += commands
            commands = policy.handle(ev.Copied(numbers(*commands)), now)
        seen += commands
    return seen


def want(policy: Policy, name: str, by_s: float, now: float, saved_s: float = 5.0) -> list[ev.Command]:
    return policy.handle(ev.Wanted(Want(name, "host", by_s, saved_s)), now)


def test_blocks_are_written_through_to_every_tier_and_host_keeps_serving() -> None:
    policy = small(disk_blocks=8)
    saves = of(ev.Save, write(policy, (A,), 1.0, settle=False))
    assert [(save.src, save.dst) for save in saves if isinstance(save, ev.Save)] == [
        ("host", "hybrid"),
        ("host", "disk"),
    ]
    policy.handle(ev.Copied(numbers(*saves)), 2.0)
    assert {place: policy.residency.state(A, place) for place in ("host", "hybrid", "disk")} == dict.fromkeys(
        ("host", "hybrid", "disk"), At.HERE
    )
    assert policy.residency.state(A, "cache") is At.ABSENT


def test_a_far_want_goes_to_the_devices_cache_and_to_host_when_its_time_is_near() -> None:
    policy = small()
    write(policy, (A, B, C), 1.0)
    assert policy.residency.state(A, "host") is At.ABSENT
    commands = want(policy, A, by_s=60.0, now=2.0)
    (prefetch,) = of(ev.Prefetch, commands)
    assert isinstance(prefetch, ev.Prefetch) and prefetch.pin and items(prefetch) == [A] and not of(ev.Load, commands)
    policy.handle(ev.Copied(numbers(prefetch)), 3.0)
    at_s = wake_s(commands)
    assert 57.0 < at_s < 58.0, "it must be looked at before its time"
    again = policy.handle(ev.Woke(), at_s)  # from the device's cache it is there sooner than was thought
    assert not of(ev.Load, again) and at_s < wake_s(again) < 58.0
    (load,) = of(ev.Load, policy.handle(ev.Woke(), wake_s(again)))
    assert isinstance(load, ev.Load) and (load.src, items(load)) == ("hybrid", [A])
    assert load.copies[0].src_at == policy.residency.blocks[A].at["hybrid"]
    commands = policy.handle(ev.Copied(numbers(load)), 58.0)
    assert of(ev.Unpin, commands) == [ev.Unpin((ev.Span(policy.residency.blocks[A].at["hybrid"], 8),))]
    (grant,) = of(ev.Grant, policy.handle(ev.Leased(1, 5, (A,), 61.0), 60.0))
    assert isinstance(grant, ev.Grant) and grant.lay == {"host": 1}


def test_a_near_want_without_room_in_host_waits_in_the_devices_cache() -> None:
    policy = small()
    write(policy, (A, B, C), 1.0)
    policy.handle(ev.Leased(2, 1, (B,), 2.0), 1.5)
    policy.handle(ev.Leased(2, 2, (C,), 2.0), 1.5)  # host is full of leased blocks
    commands = want(policy, A, by_s=4.0, now=2.0)
    assert not of(ev.Load, commands) and items(*of(ev.Prefetch, commands)) == [A]
    (load,) = of(ev.Load, policy.handle(ev.Released(2, 1), 2.5))
    assert items(load) == [A]


def test_pins_stay_within_the_budget_and_go_to_the_better_want() -> None:
    policy = small()
    write(policy, (A, B, C, D, E, F), 1.0)  # A..D lie below host
    commands = want(policy, A, 60.0, 2.0, saved_s=1.0) + want(policy, B, 60.0, 2.0, saved_s=2.0)
    policy.handle(ev.Copied(numbers(*of(ev.Prefetch, commands))), 3.0)
    assert items(*of(ev.Prefetch, commands)) == [A, B]
    assert not of(ev.Prefetch, want(policy, C, 60.0, 3.0, saved_s=1.5)), "not worth twice what is pinned"
    commands = want(policy, D, 60.0, 3.0, saved_s=9.0)
    unpin, prefetch = (command for command in commands if isinstance(command, ev.Unpin | ev.Prefetch))
    assert unpin == ev.Unpin((ev.Span(policy.residency.blocks[A].at["hybrid"], 8),)) and items(prefetch) == [D]
    policy.residency.check()


def test_a_prefetch_that_is_not_wanted_any_more_is_unpinned_when_it_ends_unless_it_is_wanted_again() -> None:
    policy = small()
    write(policy, (A, B, C), 1.0)
    (prefetch,) = of(ev.Prefetch, want(policy, A, 60.0, 2.0))
    assert not of(ev.Unpin, policy.handle(ev.Withdrawn(A), 2.1)), "it cannot be un-sent (law 4)"
    assert policy.residency.state(A, "cache") is At.UNWANTED
    assert not of(ev.Prefetch, want(policy, A, 60.0, 2.2)) and policy.residency.state(A, "cache") is At.COMING
    policy.handle(ev.Withdrawn(A), 2.3)
    commands = policy.handle(ev.Copied(numbers(prefetch)), 3.0)
    assert of(ev.Unpin, commands) and policy.residency.state(A, "cache") is At.ABSENT
    assert policy.residency.state(A, "hybrid") is At.HERE


def test_a_failed_prefetch_is_tried_again_after_a_rest() -> None:
    policy = small()
    write(policy, (A, B, C), 1.0)
    (prefetch,) = of(ev.Prefetch, want(policy, A, 60.0, 2.0))
    commands = policy.handle(ev.CopyFailed(numbers(prefetch)[0], "EIO"), 3.0)
    assert not of(ev.Prefetch, commands) and policy.lookup((A,)) == 1, "its load will say whether it can be read"
    assert policy.stats()["hybrid_failures"] == {"EIO": 1}
    assert not of(ev.Prefetch, policy.handle(ev.Remembered("x", (B,)), 4.0))
    assert items(*of(ev.Prefetch, policy.handle(ev.Remembered("y", (B,)), 5.1))) == [A]


def test_a_device_that_cannot_pin_is_told_ahead_all_the_same() -> None:
    policy = small(device=Hybrid(16 * 16, 32, pin=False, line_bytes=16, read=80.0, hit_read=800.0, write=80.0))
    write(policy, (A, B, C), 1.0)
    (prefetch,) = of(ev.Prefetch, want(policy, A, 60.0, 2.0))
    assert isinstance(prefetch, ev.Prefetch) and not prefetch.pin
    without = small(device=Hybrid(16 * 16, 0, line_bytes=16, read=80.0, hit_read=800.0, write=80.0))
    write(without, (A, B, C), 1.0)
    assert not of(ev.Prefetch, want(without, A, 60.0, 2.0)) and "cache" not in without.residency.places


def test_what_the_device_lost_comes_from_the_disk() -> None:
    """Law 1: the lease waits on for the copy that is still good, and the bad one is read by nobody again."""
    policy = small(disk_blocks=8)
    write(policy, (A, B, C), 1.0)
    (load,) = of(ev.Load, policy.handle(ev.Leased(1, 1, (A,), 50.0), 2.0))
    assert isinstance(load, ev.Load) and load.src == "hybrid"
    commands = policy.handle(ev.CopyFailed(numbers(load)[0], "checksum"), 3.0)
    (again,) = of(ev.Load, commands)
    assert isinstance(again, ev.Load) and again.src == "disk" and not of(ev.Grant, commands)
    assert policy.residency.state(A, "hybrid") is At.ABSENT
    (grant,) = of(ev.Grant, policy.handle(ev.Copied(numbers(again)), 4.0))
    assert isinstance(grant, ev.Grant) and grant.lay == {"hybrid": 1} and grant.spans[0] is not None
    assert policy.stats()["hit_blocks_by_tier"] == {"hybrid": 1}


def test_what_no_tier_has_any_more_is_a_hole_at_once() -> None:
    policy = small()
    write(policy, (A, B, C), 1.0)
    (load,) = of(ev.Load, policy.handle(ev.Leased(1, 1, (A,), 50.0), 2.0))
    (grant,) = of(ev.Grant, policy.handle(ev.CopyFailed(numbers(load)[0], "EIO"), 3.0))
    assert isinstance(grant, ev.Grant) and (grant.spans, grant.lay) == ((None,), {})
    assert policy.lookup((A,)) == 0 and policy.residency.ledger.used_bytes["hybrid"] == 32


def test_a_flush_saves_what_only_the_device_holds() -> None:
    """It left host before the disk had taken it: the device is the source, verified on the way."""
    policy = small(disk_blocks=8)
    policy.handle(ev.Prepared(1, 900, (A,), 8), 1.0)
    first = policy.handle(ev.Completed(1, 901, (A,), (7,), False), 1.0)
    to_hybrid, to_disk = of(ev.Save, first)
    policy.handle(ev.Copied(numbers(to_hybrid)), 1.1)
    policy.handle(ev.CopyFailed(numbers(to_disk)[0], "ENOSPC"), 1.2)  # the disk rests until 3.2
    write(policy, (B, C), 1.3, settle=False)
    saves = of(ev.Save, policy.handle(ev.Flushed(1, 5), 1.4))
    assert policy.residency.state(A, "host") is At.ABSENT and policy.residency.state(A, "hybrid") is At.HERE
    assert all(isinstance(save, ev.Save) and save.dst == "hybrid" for save in saves)
    saves = of(ev.Save, policy.handle(ev.Woke(), 3.3))
    ways = {(save.src, save.dst): items(save) for save in saves if isinstance(save, ev.Save)}
    assert ways["hybrid", "disk"] == [A]
    commands = policy.handle(ev.Copied(numbers(*saves)), 3.4)
    assert of(ev.Acknowledge, commands) == [ev.Acknowledge(1, 5)]


def test_a_damaged_source_is_the_devices_fault_and_not_the_disks() -> None:
    policy = small(disk_blocks=8)
    policy.handle(ev.Prepared(1, 900, (A,), 8), 1.0)
    to_hybrid, to_disk = of(ev.Save, policy.handle(ev.Completed(1, 901, (A,), (7,), False), 1.0))
    policy.handle(ev.Copied(numbers(to_hybrid)), 1.1)
    policy.handle(ev.CopyFailed(numbers(to_disk)[0], "ENOSPC"), 1.2)
    write(policy, (B, C), 1.3, settle=False)
    policy.handle(ev.Flushed(1, 5), 1.4)
    saves = [save for save in of(ev.Save, policy.handle(ev.Woke(), 3.3)) if isinstance(save, ev.Save)]
    (bad,) = (save for save in saves if save.src == "hybrid")
    commands = policy.handle(ev.CopyFailed(numbers(bad)[0], "checksum"), 3.4)
    assert policy.lookup((A,)) == 0 and policy.stats()["checksum_failures"] == 1
    assert policy.stats()["disk_failures"] == {"ENOSPC": 1}
    commands += policy.handle(ev.Copied(numbers(*[save for save in saves if save is not bad])), 3.5)
    assert of(ev.Acknowledge, commands) == [ev.Acknowledge(1, 5, (A,))]


def test_a_block_from_disk_is_kept_in_the_faster_tier_too() -> None:
    policy = small(disk_blocks=8)
    policy.handle(ev.Recovered((ev.Found(A, 0, 8, 7, 1),)), 1.0)
    (load,) = of(ev.Load, policy.handle(ev.Leased(1, 1, (A,), 9.0), 2.0))
    commands = policy.handle(ev.Copied(numbers(load)), 3.0)
    (save,) = of(ev.Save, commands)
    assert isinstance(save, ev.Save) and (save.src, save.dst) == ("host", "hybrid")


def test_an_ended_path_leaves_the_device_first() -> None:
    policy = small(host_blocks=8, device=Hybrid(2 * 16, line_bytes=16, read=80.0, write=80.0))
    write(policy, (A, B), 1.0)
    policy.handle(ev.Remembered("over", (B,)), 2.0)
    policy.handle(ev.Withdrawn("over"), 2.0)
    write(policy, (C,), 3.0)
    assert [policy.residency.state(item, "hybrid") is At.HERE for item in (A, B, C)] == [True, False, True]


def test_what_is_pinned_does_not_leave_the_device_for_a_better_block() -> None:
    """Its bytes must not change hands while the device was told to keep them."""
    policy = small(device=Hybrid(3 * 16, cache_bytes=16, line_bytes=16, read=80.0, hit_read=800.0, write=80.0))
    write(policy, (A,), 1.0)
    write(policy, (B, C), 900.0)  # A is below host only
    (prefetch,) = of(ev.Prefetch, want(policy, A, by_s=9e6, now=901.0, saved_s=1e-9))
    policy.handle(ev.Copied(numbers(prefetch)), 902.0)
    write(policy, (D, E, F), 903.0)
    assert policy.residency.state(A, "hybrid") is At.HERE and policy.residency.state(A, "cache") is At.HERE
    policy.handle(ev.Withdrawn(A), 904.0)
    write(policy, (B,), 905.0)
    assert policy.residency.state(A, "hybrid") is At.ABSENT
