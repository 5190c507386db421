"""Reader of the Mooncake traces: JSONL, one request a line, with arrival, lengths and hashes of 512-token blocks."""

from typing import Annotated

import msgspec

from outrider.lab.traces.blocks import Ids
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.runs import collect, head, join
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512
Count = Annotated[int, msgspec.Meta(ge=0)]


class Request(msgspec.Struct):
    """One line. timestamp in ms; hash_ids hold the partial last block too."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: list[int]


def read(source: Source, limit: int | None) -> Draft:
    """Every request a workflow of one call; requests with equal leading hashes share those blocks."""
    ids, workflows = Ids(), list[Workflow]()
    own: dict[int, int] = {}  # the trace's hash -> the workload's id, in order of appearance
    decoder = msgspec.json.Decoder(Request)
    for number, line in source.lines():
        request = source.decode(number, line, decoder)
        if len(request.hash_ids) != -(-request.input_length // BLOCK_TOKENS):
            blocks = -(-request.input_length // BLOCK_TOKENS)
            raise source.fault(number, f"{len(request.hash_ids)} hash_ids, {blocks} blocks of {BLOCK_TOKENS} tokens")
        for block in request.hash_ids:
            if block not in own:
                own[block] = ids.next
                ids.take(1)
        whole = request.input_length // BLOCK_TOKENS
        prompt = head(collect(own[block] for block in request.hash_ids), whole)
        after = (request.input_length + request.output_length) // BLOCK_TOKENS - whole
        name = f"request-{len(workflows)}"
        lengths = request.input_length, request.output_length
        call = Call(name, "", "", (), 0.0, *lengths, prompt, join(prompt, ids.take(after)))
        workflows.append(Workflow(name, request.timestamp / 1000, (call,)))
    notes = (
        "a request is a workflow of one call: the trace does not tell which requests belong together",
        f"prompts share blocks of {BLOCK_TOKENS} tokens by the trace's hashes; an output's blocks are nobody else's",
    )
    return Draft(BLOCK_TOKENS, workflows, True, notes)
