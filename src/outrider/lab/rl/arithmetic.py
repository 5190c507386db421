"""A task with a rule for a reward: sums, differences and products in a vocabulary of sixteen characters. Used by learn.

^47-8=     a prompt: numbers of one or two digits, written as people do; a difference is never negative
39.        the one right answer; every other output earns nothing
"""

import msgspec
import numpy as np

VOCABULARY = "0123456789+-*=.^"
START, END = VOCABULARY.index("^"), VOCABULARY.index(".")
PROMPT_TOKENS, OUTPUT_TOKENS = len("^99+99="), len("198.") + 1  # at most; an output may run past the answer


class Problem(msgspec.Struct, frozen=True):
    """Token ids of a prompt, and of its answer with the end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def ids(text: str) -> tuple[int, ...]:
    return tuple(VOCABULARY.index(character) for character in text)


def text(tokens: tuple[int, ...]) -> str:
    return "".join(VOCABULARY[token] for token in tokens)


def solve(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The answer that the rule asks for, read off the prompt alone."""
    question = text(prompt)[1:-1]
    operation = next(c for c in question if c in "+-*")
    left, right = (int(number) for number in question.split(operation))
    result = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return ids(f"{result}.")


def reward(prompt: tuple[int, ...], output: tuple[int, ...]) -> float:
    """1 for the answer and nothing else, 0 otherwise: exact match, no partial credit."""
    return float(output == solve(prompt))


def draw(rng: np.random.Generator) -> Problem:
    """One digit or two for both numbers, any operation, all equally likely; products take one digit on the right."""
    limit = 10 ** int(rng.integers(1, 3))
    operation = "+-*"[int(rng.integers(3))]
    left, right = (int(number) for number in rng.integers(limit, size=2))
    if operation == "-":
        left, right = max(left, right), min(left, right)
    if operation == "*":
        right %= 10
    prompt = ids(f"^{left}{operation}{right}=")
    return Problem(prompt, solve(prompt))
