"""Megatron's router traces (`--moe-routing-trace-path`): JSON lines of one layer's routes each, a file a rank. A door.

    {"step": 7, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 128, "topk": 8,
     "top_indices": [[12, 45, ...], ...]}

A rank writes a record per layer and forward pass, so the n-th record of a layer in a step is micro-batch n. Pipeline
stages lie in separate files: ranks that name the same layers hold other tokens of them, ranks that name others hold the
same tokens, matched in the order of their rank numbers (pipeline is Megatron's outermost axis). Traces taken by forward
hooks number layers from the stage's own first one: then every rank names the same layers, and only the caller knows the
number of stages (`pipeline`). Records of multi-token-prediction heads are left out.

In the table the tokens of (step, micro-batch, rank) are one sequence, in that order, and `source_T` counts the ranks
within a stage.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from outrider.errors import CallerError
from outrider.experts.adapters.filling import Ask, Filling
from outrider.experts.adapters.lines import decoded, numbered
from outrider.experts.adapters.npz import in_order, with_gaps
from outrider.experts.routing import Ids, Mask, Routing, smallest

Place = tuple[int, int, int]  # step, micro-batch, rank within its stage


class Head(msgspec.Struct):
    """A record without its routes: what the first pass needs."""

    step: int
    layer: int
    rank: int
    num_tokens: int
    topk: int
    block: str = "decoder"
    mtp_idx: int | None = None


class Record(Head):
    top_indices: list[list[int]] = msgspec.field(default_factory=list)


class Layout(msgspec.Struct, frozen=True):
    """Where everything goes: layer of (rank, layer number), rank within its stage, tokens and start of each place."""

    layer_at: dict[tuple[int, int], int]
    within: dict[int, int]
    tokens: dict[Place, int]
    starts: dict[Place, int]
    layer_ids: tuple[int, ...]
    top_k: int
    notes: tuple[str, ...]


def is_megatron(record: dict[str, object]) -> bool:
    return {"top_indices", "layer", "rank", "num_tokens"} <= record.keys()


def read_megatron(path: Path, ask: Ask) -> Routing:
    """One file, or the folder of all ranks. The files are gone through three times: layout, type, table."""
    layout = _layout(path, ask)
    most, gaps = -1, False
    for _, _, rows in _rows(path, layout, ask):
        most = max(most, int(rows.max(initial=-1)))
        gaps |= bool((rows < 0).any())
    table = Filling(sum(layout.tokens.values()), len(layout.layer_ids), layout.top_k, smallest(most, gaps))
    layers_T = np.zeros(table.tokens, dtype=np.int32)  # in how many layers the token has a row
    for place, layer, rows in _rows(path, layout, ask):
        part = slice(layout.starts[place], layout.starts[place] + len(rows))
        there: Mask = np.all(rows >= 0, axis=1)
        layers_T[part] += there
        table.routes_TLK[part, layer] = np.where(there[:, None], rows, -1 if gaps else 0)
    table.known_T[:] = layers_T > 0
    places = list(layout.tokens)
    lengths = [layout.tokens[place] for place in places]
    source = np.repeat([place[2] for place in places], lengths)
    return table.routing(lengths, ask, source_T=source, layer_ids=layout.layer_ids, notes=layout.notes)


def _layout(path: Path, ask: Ask) -> Layout:
    """First pass: which ranks share a stage, and how many tokens each holds in each micro-batch."""
    decoder = msgspec.json.Decoder(Head)
    tokens: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # rank, step: by layer
    layers: dict[int, set[int]] = defaultdict(set)
    top_k, heads = 0, 0
    for where, line in _lines(path):
        head = decoded(where, line, decoder)
        if ask.step is not None and head.step != ask.step:
            continue
        if head.block != "decoder" or head.mtp_idx is not None:
            heads += 1
            continue
        if top_k not in (0, head.topk):
            raise CallerError(
                f"{where}: top {head.topk}, the records before have top {top_k}. Give traces of one model."
            )
        top_k = head.topk
        layers[head.rank].add(head.layer)
        tokens[head.rank, head.step][head.layer].append(head.num_tokens)
    if not layers:
        only = "" if ask.step is None else f" of step {ask.step}"
        raise CallerError(f"{path}: no record{only} of a decoder layer. Name the folder of router_trace_rank*.jsonl.")
    stages, notes = _stages(path, layers, ask.pipeline)
    within = {rank: i for stage in stages for i, rank in enumerate(stage)}
    layer_at, layer_ids = _numbered(stages, layers, ask.pipeline)
    places: dict[Place, int] = {}
    for (rank, step), by_layer in sorted(tokens.items(), key=lambda item: (item[0][1], item[0][0])):
        counts = list(by_layer.values())
        if len(by_layer) != len(layers[rank]) or any(count != counts[0] for count in counts):
            raise CallerError(f"{path}, rank {rank}, step {step}: its layers have unequal records. Was the trace cut?")
        for m, n in enumerate(counts[0]):
            if places.setdefault((step, m, within[rank]), n) != n:
                raise CallerError(
                    f"{path}, rank {rank}, step {step}, micro-batch {m}: {n} tokens, another stage has"
                    f" {places[step, m, within[rank]]}. Give all ranks' files, and the pipeline stages."
                )
    ordered = {place: places[place] for place in sorted(places)}
    starts = dict(zip(ordered, np.cumsum([0, *ordered.values()]).tolist(), strict=False))
    if heads:
        notes.append(f"{heads} records of multi-token-prediction heads left out")
    if len({step for step, _, _ in ordered}) > 1:
        notes.append("several steps read as one table, in their order")
    return Layout(layer_at, within, ordered, starts, layer_ids, top_k, tuple(notes))


def _stages(path: Path, layers: dict[int, set[int]], pipeline: int) -> tuple[list[list[int]], list[str]]:
    """Ranks of each stage in order, first stage first."""
    ranks = sorted(layers)
    if pipeline > 1:
        if len(ranks) % pipeline:
            raise CallerError(
                f"{path}: {len(ranks)} ranks do not divide by pipeline {pipeline}. Give the files of all ranks."
            )
        size = len(ranks) // pipeline
        return [ranks[at : at + size] for at in range(0, len(ranks), size)], []
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in ranks:
        groups[tuple(sorted(layers[rank]))].append(rank)
    stages = [groups[names] for names in sorted(groups)]
    if len({layer for names in groups for layer in names}) < sum(len(names) for names in groups):
        raise CallerError(
            f"{path}: ranks name overlapping layers, so they count them from their own first one. Say how many pipeline"
            " stages there are (--pipeline)."
        )
    if len({len(stage) for stage in stages}) > 1:
        raise CallerError(f"{path}: stages of {[len(stage) for stage in stages]} ranks. Give the files of all ranks.")
    alone = len(stages) == 1 and len(ranks) > 1
    return stages, [
        "all ranks name the same layers: read as other tokens, not as other pipeline stages"
    ] if alone else []


def _numbered(
    stages: list[list[int]], layers: dict[int, set[int]], pipeline: int
) -> tuple[dict[tuple[int, int], int], tuple[int, ...]]:
    """Column of each (rank, layer number), and the number that each column bears."""
    layer_at: dict[tuple[int, int], int] = {}
    if pipeline > 1 and len({layer for names in layers.values() for layer in names}) < sum(
        len(layers[stage[0]]) for stage in stages
    ):
        first = 0
        for stage in stages:
            for rank in stage:
                layer_at |= {(rank, layer): first + i for i, layer in enumerate(sorted(layers[rank]))}
            first += len(layers[stage[0]])
        return layer_at, tuple(range(first))
    every = sorted({layer for names in layers.values() for layer in names})
    for rank, names in layers.items():
        layer_at |= {(rank, layer): every.index(layer) for layer in names}
    return layer_at, tuple(every)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in in_order(path, "router_trace_rank*.jsonl", "*.jsonl"):
        yield from numbered(file)


def _rows(path: Path, layout: Layout, ask: Ask) -> Iterator[tuple[Place, int, Ids]]:
    """Place, layer column and [tokens, top_k] of every record that counts."""
    decoder = msgspec.json.Decoder(Record)
    seen: dict[tuple[int, int, int], int] = defaultdict(int)
    for where, line in _lines(path):
        record = decoded(where, line, decoder)
        if record.block != "decoder" or record.mtp_idx is not None or ask.step not in (None, record.step):
            continue
        key = (record.step, record.rank, record.layer)
        m, seen[key] = seen[key], seen[key] + 1
        flat = [i for row in record.top_indices for i in row]
        if len(record.top_indices) != record.num_tokens or len(flat) != record.num_tokens * record.topk:
            raise CallerError(
                f"{where}: top_indices are not num_tokens {record.num_tokens} rows of {record.topk}. Is the line whole?"
            )
        rows = np.array(flat, dtype=np.int32).reshape(-1, record.topk)
        yield (record.step, m, layout.within[record.rank]), layout.layer_at[record.rank, record.layer], rows


def write_megatron(routing: Routing, path: Path) -> None:
    """One file as rank 0 writes it, each sequence a micro-batch of step 0; unknown rows are -1, never Megatron's."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as out:
        for start, stop in zip(routing.offsets_S1[:-1], routing.offsets_S1[1:], strict=True):
            rows = with_gaps(routing, int(start), int(stop))
            for i, layer in enumerate(routing.layer_ids):
                head = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
                shape = {"num_tokens": len(rows), "topk": routing.top_k}
                out.write(encoder.encode({**head, **shape, "top_indices": rows[:, i].tolist()}) + b"\n")
