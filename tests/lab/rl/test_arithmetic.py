"""The rule against Python's own arithmetic, and nothing but the answer earns a reward."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from outrider.lab.rl.arithmetic import END, OUTPUT_TOKENS, PROMPT_TOKENS, VOCABULARY, draw, reward, text

problems = st.integers(0, 2**32 - 1).map(lambda seed: draw(np.random.default_rng(seed)))
outputs = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=OUTPUT_TOKENS).map(tuple)


@given(problems)
def test_the_answer_is_pythons(problem):
    question, answer = text(problem.prompt), text(problem.answer)
    assert question[0] == "^" and question[-1] == "="
    assert answer == f"{eval(question[1:-1])}."
    assert eval(question[1:-1]) >= 0
    assert len(problem.prompt) <= PROMPT_TOKENS
    assert len(problem.answer) < OUTPUT_TOKENS
    assert reward(problem.prompt, problem.answer) == 1.0


@given(problems, outputs, st.integers(0, OUTPUT_TOKENS), st.integers(0, len(VOCABULARY) - 1))
def test_everything_else_earns_nothing(problem, output, place, token):
    near = (*problem.answer[:place], token, *problem.answer[place + 1 :])
    for wrong in (output, near, problem.answer[:-1], (*problem.answer, END)):
        assert reward(problem.prompt, wrong) == float(wrong == problem.answer)


def test_all_kinds_of_problems_come():
    rng = np.random.default_rng(0)
    drawn = [text(draw(rng).prompt) for _ in range(600)]
    for operation in "+-*":
        lengths = {len(question) for question in drawn if operation in question}
        assert lengths == ({5, 6, 7} if operation != "*" else {5, 6})
