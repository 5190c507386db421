"""Everything that enters and leaves the policy of `agents`. Pure data; read this page first.

| event      | who emits it, when                                           | how often              |
|------------|--------------------------------------------------------------|------------------------|
| EngineUp   | move: an engine answered a probe                             | every probe            |
| EngineDown | move: an engine did not answer a probe                       | every probe            |
| Arrived    | gateway: a call was read whole and identified                | once a call, first     |
| FirstByte  | move: the first byte of an engine's answer is here           | at most once an attempt |
| Finished   | move: an engine's answer ended well (any status it chose)    | ends an attempt        |
| Failed     | move: an attempt ended badly                                 | ends an attempt        |
| Gone       | gateway: the client closed its connection                    | at most once a call    |
| Woke       | move: the time of a Wake has come                            | once a Wake            |

| command    | what the shell does                                          | terminal |
|------------|--------------------------------------------------------------|----------|
| Dispatch   | send the call to that engine, within those time limits       |          |
| Hold       | nothing: says why the call waits                             |          |
| Wake       | emit Woke at that time                                       |          |
| Tell       | hand the want to memory                                      |          |
| Settle     | nothing more: the answer is with the client                  | yes      |
| Reject     | answer with this status and sentence                         | yes      |
| Relay      | answer with the engine's own error                           | yes      |
| Break      | end the broken answer with an error event                    | yes      |
| Abort      | close the connection to the engine, if any                   | yes      |

Every call that arrived gets exactly one terminal command (law 8). Times are seconds on the caller's clock.
No event holds prompt text or a secret: prompts enter as digests and lengths.
"""

import msgspec

from outrider.wants import Want


class Identity(msgspec.Struct, frozen=True):
    """Who speaks, as claimed by the client. `sources` says which contract each field came from; "" = unknown."""

    workflow: str = ""
    role: str = ""
    stage: str = ""
    parent: str = ""
    klass: str = ""  # interactive | batch
    next_role: str = ""
    deadline_s: float | None = None  # seconds after arrival
    final: bool = False
    sources: dict[str, str] = {}
    ignored: tuple[str, ...] = ()  # what was malformed or contradicted, in words

    @property
    def stage_name(self) -> str:
        """`review` of `review/2`: what history is kept by."""
        return self.stage.partition("/")[0]


class Link(msgspec.Struct, frozen=True, array_like=True):
    """One piece of a prompt: the digest of everything up to its end, and its own length in characters."""

    digest: str
    chars: int


class Call(msgspec.Struct, frozen=True):
    """One request as the policy knows it. `chain` is its prompt, piece by piece; `chars` the whole prompt."""

    id: str
    identity: Identity
    path: str
    tenant: str = ""
    model: str = ""
    stream: bool = False
    chars: int = 0
    max_tokens: int | None = None
    chain: tuple[Link, ...] = ()


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer; `estimated` when the engine gave no usage and its chunks were counted."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, from the engine's own cache or memory
    external_tokens: int = 0  # of those cached, from memory
    estimated: bool = True


class EngineUp(msgspec.Struct, frozen=True, tag=True):
    engine: str
    models: tuple[str, ...] = ()
    kv_tokens: int | None = None  # capacity; None: the engine does not say
    kv_usage: float = 0.0  # 0..1
    running: int = 0
    waiting: int = 0


class EngineDown(msgspec.Struct, frozen=True, tag=True):
    engine: str
    why: str
    refused: bool  # nothing listens there; else it was only slow or said 5xx


class Arrived(msgspec.Struct, frozen=True, tag=True):
    call: Call


class FirstByte(msgspec.Struct, frozen=True, tag=True):
    call: str
    attempt: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    call: str
    attempt: int
    status: int
    usage: Usage | None  # None: nothing could be read from the answer


class Failed(msgspec.Struct, frozen=True, tag=True):
    """kind: refused (no connection), reset (it broke), timeout, status (500, 502, 503, 504 before a byte was sent)."""

    call: str
    attempt: int
    kind: str
    why: str
    started: bool  # the client has bytes already: no second try


class Gone(msgspec.Struct, frozen=True, tag=True):
    call: str


class Woke(msgspec.Struct, frozen=True, tag=True):
    pass


Event = EngineUp | EngineDown | Arrived | FirstByte | Finished | Failed | Gone | Woke


class Score(msgspec.Struct, frozen=True):
    """Why an engine: seconds until the call's first byte there, and what they are made of."""

    engine: str
    prefill_s: float
    load_s: float
    outstanding_s: float
    resident_tokens: int

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.load_s + self.outstanding_s


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    call: str
    engine: str
    attempt: int
    first_byte_s: float  # limits of this attempt, in seconds from now
    total_s: float
    queued_s: float
    reason: str  # order | oldest: whose turn it was; then residency | sticky: how the engine was chosen
    scores: tuple[Score, ...]
    predicted_tokens: int
    bound_tokens: int
    predicted_from: str
    remaining_s: float
    reserved_tokens: int


class Hold(msgspec.Struct, frozen=True, tag=True):
    call: str
    position: int  # 1 = next in order
    ahead: tuple[str, ...]  # at most 8 ids, the nearest to their start first
    remaining_s: float
    free_credit: dict[str, int]


class Wake(msgspec.Struct, frozen=True, tag=True):
    at_s: float


class Tell(msgspec.Struct, frozen=True, tag=True):
    want: Want


class Settle(msgspec.Struct, frozen=True, tag=True):
    call: str
    engine: str
    status: int
    usage: Usage | None
    ttft_s: float  # from arrival
    total_s: float  # from arrival


class Reject(msgspec.Struct, frozen=True, tag=True):
    call: str
    status: int
    why: str
    retry_after_s: int | None = None


class Relay(msgspec.Struct, frozen=True, tag=True):
    call: str
    why: str


class Break(msgspec.Struct, frozen=True, tag=True):
    call: str
    why: str


class Abort(msgspec.Struct, frozen=True, tag=True):
    call: str
    engine: str  # "" when it was still queued


Terminal = Settle | Reject | Relay | Break | Abort
Command = Dispatch | Hold | Wake | Tell | Settle | Reject | Relay | Break | Abort
