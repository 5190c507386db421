"""Reader of the Azure LLM inference traces: CSV, one request a line, with arrival and lengths and nothing else."""

import csv
from datetime import UTC, datetime

from outrider.lab.traces.blocks import Ids
from outrider.lab.traces.draft import Draft
from outrider.lab.traces.runs import head
from outrider.lab.traces.source import Source
from outrider.lab.traces.workload import Call, Workflow

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BLOCK_TOKENS = 16


def read(source: Source, limit: int | None) -> Draft:
    """Every request a workflow of one call, with blocks of its own."""
    ids, workflows, where = Ids(), list[Workflow](), list[int]()
    for number, line in source.lines():
        row = next(csv.reader([line.decode(errors="replace")]))
        if not where:
            where = _columns(source, number, row)
            continue
        try:
            stamp, prompt_tokens, output_tokens = (row[i] for i in where)
            start_s, lengths = _seconds(stamp), (int(prompt_tokens), int(output_tokens))
        except (ValueError, IndexError) as error:
            raise source.fault(number, f"not {','.join(COLUMNS)} ({error})") from error
        if min(lengths) < 0:
            raise source.fault(number, "a negative number of tokens")
        name = f"request-{len(workflows)}"
        chain = ids.take(sum(lengths) // BLOCK_TOKENS)
        call = Call(name, "", "", (), 0.0, *lengths, head(chain, lengths[0] // BLOCK_TOKENS), chain)
        workflows.append(Workflow(name, start_s, (call,)))
    note = f"the trace tells no prefixes: no two requests share a block (of {BLOCK_TOKENS} tokens)"
    return Draft(BLOCK_TOKENS, workflows, True, ("a request is a workflow of one call", note))


def _columns(source: Source, number: int, row: list[str]) -> list[int]:
    """Where each of COLUMNS stands in the header."""
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise source.fault(number, f"the header lacks {', '.join(missing)}")
    return [row.index(name) for name in COLUMNS]


def _seconds(stamp: str) -> float:
    """Seconds since 1970. Without a zone it is UTC; digits below a microsecond are dropped."""
    moment = datetime.fromisoformat(stamp)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
