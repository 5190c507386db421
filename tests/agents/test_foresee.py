"""What the predictors promise: fallback order, coverage of the bound, bounded state, rates that converge."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.agents.events import Call, Identity, Link, Usage
from outrider.agents.foresee import Lengths, Remaining, Returns, Samples
from outrider.agents.line import Line, Waiting
from outrider.agents.lru import Lru
from outrider.agents.prefixes import Prefixes
from outrider.agents.rates import Rates
from outrider.agents.settings import Foresight

SETTINGS = Foresight()


def call(role: str = "coder", stage: str = "code/1", max_tokens: int | None = None, **options: Any) -> Call:
    return Call("c", Identity("w", role, stage), "/v1/completions", max_tokens=max_tokens, **options)


def teach(lengths: Lengths, asked: Call, *outputs: int) -> None:
    for output in outputs:
        lengths.learn(asked, lengths.predict(asked, None), output)


def test_the_most_specific_history_speaks() -> None:
    lengths = Lengths(SETTINGS)
    assert lengths.predict(call(), None).origin == "prior"
    assert lengths.predict(call(max_tokens=9), None).tokens == 9
    teach(lengths, call("other", "x"), 1000)
    assert (lengths.predict(call(), None).tokens, lengths.predict(call(), None).origin) == (1000, "all calls")
    teach(lengths, call("coder", "plan/1"), 300)
    assert (lengths.predict(call(), None).tokens, lengths.predict(call(), None).origin) == (300, "role")
    teach(lengths, call("coder", "code/7"), 50, 60, 70)
    assert (lengths.predict(call(), None).tokens, lengths.predict(call(), None).origin) == (60, "role and stage")
    own = Samples()
    own.add(5)
    assert (lengths.predict(call(), own).tokens, lengths.predict(call(), own).origin) == (5, "this workflow")


@given(
    outputs=st.lists(st.integers(-5, 20_000), max_size=40),
    limit=st.none() | st.integers(1, 5000),
    own=st.lists(st.integers(0, 9000), max_size=5),
)
def test_a_forecast_is_always_sane(outputs: list[int], limit: int | None, own: list[int]) -> None:
    lengths = Lengths(SETTINGS)
    teach(lengths, call(), *outputs)
    samples = Samples()
    for length in own:
        samples.add(length)
    got = lengths.predict(call(max_tokens=limit), samples)
    assert 1 <= got.tokens <= got.bound_tokens <= (limit or SETTINGS.prior_max_tokens)


@pytest.mark.parametrize("draw", ["geometric", "drifting", "two humps"])
def test_the_bound_covers_what_it_promises(draw: str) -> None:
    """0.95 within 1.5 points over 4,000 calls, and within 3 per role, though lengths are heavy-tailed or drift."""
    source = random.Random(5)
    lengths = Lengths(SETTINGS)
    held: dict[str, list[bool]] = {"a": [], "b": []}
    for at in range(4000):
        role = "ab"[at % 2]
        scale = {"geometric": 200, "drifting": 100 + at // 8, "two humps": source.choice([20, 900])}[draw]
        output = min(4000, int(source.expovariate(1 / (scale * (1 if role == "a" else 3)))) + 1)
        forecast = lengths.predict(call(role), None)
        held[role].append(output <= forecast.bound_tokens)
        lengths.learn(call(role), forecast, output)
    everyone = held["a"] + held["b"]
    assert abs(sum(everyone) / len(everyone) - 0.95) < 0.015
    for seen in held.values():
        assert abs(sum(seen) / len(seen) - 0.95) < 0.03


def test_the_bound_is_far_below_max_tokens_once_lengths_are_known() -> None:
    lengths = Lengths(SETTINGS)
    source = random.Random(1)
    teach(lengths, call(), *(source.randint(80, 120) for _ in range(200)))
    assert 100 < lengths.predict(call(), None).bound_tokens < 200


def test_remaining_work_counts_back_from_the_end() -> None:
    remaining = Remaining(SETTINGS)
    fresh = call("new", "")
    assert remaining.predict(fresh, 2.0) == 2.0 * SETTINGS.prior_calls
    for _ in range(3):
        remaining.learn([(("plan", ""), 1.0), (("code", ""), 4.0), (("code", ""), 6.0), (("sum", ""), 2.0)])
    assert remaining.predict(call("plan", ""), 1.0) == 13.0
    assert remaining.predict(call("sum", ""), 1.0) == 2.0
    assert remaining.predict(call("sum", ""), 9.0) == 9.0, "never less than the call itself"
    final = Call("c", Identity("w", "plan", "", final=True), "/v1/completions")
    assert remaining.predict(final, 1.0) == 1.0


def test_returns_learn_gap_and_chance() -> None:
    returns = Returns(SETTINGS)
    assert returns.predict(("coder", "")) == (SETTINGS.prior_gap_s, 0.5)
    for _ in range(20):
        returns.learn(("coder", ""), 2.0)
        returns.learn(("planner", ""), None)
    gap_s, chance = returns.predict(("coder", ""))
    assert gap_s == 2.0
    assert chance > 0.9
    assert returns.predict(("planner", ""))[1] < 0.1


def test_rates_converge_to_the_engines_own() -> None:
    rates = Rates(SETTINGS)
    source = random.Random(2)
    for _ in range(300):
        prompt, cached, output = source.randint(100, 3000), source.choice([0, 60]), source.randint(5, 200)
        prompt += cached
        if source.random() < 0.3:
            cached = prompt - 20
        external = cached // 2
        asked = Call("c", Identity(), "/v1/completions", stream=True, chars=prompt * 3)
        ttft_s = (prompt - cached) * 0.004 + external * 0.001
        rates.learn(
            asked, Usage(prompt, output, cached, external, False), ttft_s, (output - 1) * 0.05, source.randint(0, 3)
        )
    assert rates.tokens_per_char == pytest.approx(1 / 3, rel=0.01)
    assert rates.prefill_s == pytest.approx(0.004, rel=0.1)
    assert rates.decode_s == pytest.approx(0.05, rel=0.02)
    assert rates.load_s == pytest.approx(0.001, rel=0.1)
    before = (rates.prefill_s, rates.decode_s, rates.tokens_per_char)
    rates.learn(asked, Usage(0, 50, estimated=True), 100.0, 100.0, 0)
    assert (rates.prefill_s, rates.decode_s, rates.tokens_per_char) == before, "estimates teach nothing"


def test_calls_that_do_not_stream_teach_their_sum() -> None:
    rates = Rates(SETTINGS)
    for _ in range(200):
        asked = Call("c", Identity(), "/v1/completions", stream=False, chars=4000)
        rates.learn(asked, Usage(1000, 100, 0, 0, False), 14.0, 0.0, 0)
    assert 1000 * rates.prefill_s + 100 * rates.decode_s == pytest.approx(14.0, rel=0.01)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5)), max_size=60), st.integers(50, 500))
def test_prefixes_never_hold_more_than_fits_nor_claim_holes(asked: list[tuple[str, int]], capacity: int) -> None:
    prefixes = Prefixes(capacity)
    for first, length in asked:
        links = [Link(f"{first}{at}", 100) for at in range(length)]
        prefixes.touch(links, 0.5)
        assert prefixes.held_tokens <= capacity
        assert prefixes.held_tokens == pytest.approx(50 * len(prefixes))
        fits = min(length, capacity // 50)
        assert prefixes.resident_chars(links) == 100 * fits, "what was just read is here, its beginning first"
    prefixes.clear()
    assert prefixes.resident_chars([Link("a0", 100)]) == 0


def test_an_lru_forgets_the_least_recent() -> None:
    lru: Lru[str, int] = Lru(2)
    assert lru.put("a", 1) == []
    lru.put("b", 2)
    lru.get("a")
    assert lru.put("c", 3) == [2]
    assert ("a" in lru, "b" in lru, len(lru)) == (True, False, 2)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100)), max_size=30), st.randoms())
def test_a_line_keeps_two_total_orders(entries: list[tuple[int, float]], source: random.Random) -> None:
    line = Line()
    for number, (rank, remaining_s) in enumerate(entries):
        asked = Call(f"c{number}", Identity(), "/v1/completions")
        forecast = Lengths(SETTINGS).predict(asked, None)
        line.add(Waiting(asked, number, 0.0, (rank, remaining_s, number), forecast, remaining_s, 1, "w"))
    kept = [waiting.call.id for waiting in line.by_age()]
    for call_id in [name for name in kept if source.random() < 0.5]:
        line.remove(call_id)
        kept.remove(call_id)
    assert [waiting.call.id for waiting in line.by_age()] == kept
    ordered = [waiting.urgency for waiting in line.by_urgency()]
    assert ordered == sorted(ordered)
    assert len(ordered) == len(kept) == len(line)
    for place, waiting in enumerate(line.by_urgency()):
        assert len(line.ahead_of(waiting.call.id)) == place
