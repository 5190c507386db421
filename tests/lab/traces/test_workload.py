"""A workload that is not whole is refused, and the sentence names the call."""

from dataclasses import replace

import pytest

from outrider.errors import CallerError
from outrider.lab.traces.workload import Call, Workflow, Workload

FIRST = Call("a", "planner", "plan", (), 0.0, 40, 10, ((0, 2),), ((0, 3),))
SECOND = Call("b", "coder", "code", ("a",), 1.5, 70, 5, ((0, 3), (9, 1)), ((0, 3), (9, 1)), 64)
FLOW = Workflow("w", 0.0, (FIRST, SECOND), "batch", 30.0)
WHOLE = Workload("ours", "trace.jsonl", 16, (FLOW,), ())


def with_second(**changes: object) -> Workload:
    return replace(WHOLE, workflows=(replace(FLOW, calls=(FIRST, replace(SECOND, **changes))),))  # type: ignore[arg-type]


def test_a_whole_workload_is_itself() -> None:
    assert WHOLE.check() is WHOLE
    assert [call.id for call in WHOLE.calls] == ["a", "b"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (with_second(parents=("z",)), "waits for 'z'"),
        (with_second(parents=("b",)), "waits for 'b'"),
        (with_second(parents=("a", "a")), "a parent twice"),
        (with_second(after_s=-0.1), "after its parents"),
        (with_second(after_s=float("nan")), "after its parents"),
        (with_second(prompt_tokens=-1), "negative number of tokens"),
        (with_second(output_tokens=-1), "negative number of tokens"),
        (with_second(max_tokens=-1), "negative max_tokens"),
        (with_second(prompt_tokens=63), "more than whole ones"),
        (with_second(chain=((0, 5),)), "more than 4 whole ones"),
        (with_second(chain=((0, 3),)), "does not begin with its prompt"),
        (with_second(chain=((0, 3), (8, 1))), "does not begin with its prompt"),
        (with_second(chain=((0, 3), (9, 1), (12, 0))), "empty or negative run"),
        (with_second(id="a"), "a second call 'a'"),
        (replace(WHOLE, workflows=(replace(FLOW, calls=(SECOND, FIRST)),)), "waits for 'a'"),
        (replace(WHOLE, workflows=(replace(FLOW, calls=()),)), "has no call"),
        (replace(WHOLE, workflows=(FLOW, FLOW)), "appears twice"),
        (replace(WHOLE, workflows=(replace(FLOW, start_s=2.0), replace(FLOW, name="v"))), "starts before"),
        (replace(WHOLE, workflows=(replace(FLOW, start_s=-1.0),)), "starts before"),
        (replace(WHOLE, workflows=(replace(FLOW, deadline_s=-1.0),)), "negative deadline"),
        (replace(WHOLE, block_tokens=0), "at least one"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(broken: Workload, says: str) -> None:
    with pytest.raises(CallerError, match=r"trace\.jsonl") as refused:
        broken.check()
    assert says in str(refused.value)
