"""Tokens to text as they come: never half a character, never a piece of a stop string. Pure, one object a request."""

from collections.abc import Callable, Sequence


class Text:
    """Incremental detokenizer. `decode` turns token ids into text (special tokens left out)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self.decode, self.stop = decode, stop
        self.tokens: list[int] = []
        self.start = 0  # tokens[start:read] were decoded last time: the context that spaces depend on
        self.read = 0
        self.held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Text that is now certain. Sets `stopped` when a stop string is complete; it is not part of the text."""
        self.tokens += tokens
        before, now = self.decode(self.tokens[self.start : self.read]), self.decode(self.tokens[self.start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""  # the bytes of a character are still on their way
        self.start, self.read = self.read, len(self.tokens)
        return self.certain(self.held + now[len(before) :])

    def end(self) -> str:
        """What was held back, when nothing more will come."""
        before, now = self.decode(self.tokens[self.start : self.read]), self.decode(self.tokens[self.start :])
        rest, self.held, self.read = self.held + now[len(before) :], "", len(self.tokens)
        text = self.certain(rest)
        held, self.held = self.held, ""
        return text if self.stopped else text + held

    def certain(self, text: str) -> str:
        hits = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if hits:
            self.stopped, self.held = True, ""
            return text[: min(hits)]
        longest = max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
