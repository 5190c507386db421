"""Which reader reads a file, told by its content; reading, and writing in another format. A door; called by `cli`.

format      what it is                                            reader, writer
outrider    our own compact npz                                   npz.py
domains     npz of NAME_ids [layers, tokens, top_k]               npz.py
dump        npz of one request, or a folder of them               npz.py
verl        a padded or nested veRL batch: npz or torch.save      verl.py
vllm        answers of vLLM, a JSON object each                   answers.py
engine      answers of Outrider's own engine                      answers.py
sglang      answers of SGLang                                     answers.py
megatron    router_trace_rank*.jsonl, a file or a folder          megatron.py
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from outrider.errors import CallerError
from outrider.experts.adapters import answers, megatron, npz, verl
from outrider.experts.adapters.filling import Ask, without_dense
from outrider.experts.adapters.lines import records
from outrider.experts.adapters.members import Npz
from outrider.experts.routing import Routing


class Format(NamedTuple):
    read: Callable[[Path, Ask], Routing]
    write: Callable[[Routing, Path], None]


FORMATS = {
    "outrider": Format(npz.read_outrider, npz.write_outrider),
    "domains": Format(npz.read_domains, npz.write_domains),
    "dump": Format(npz.read_dump, npz.write_dump),
    "verl": Format(verl.read_verl, verl.write_verl),
    "vllm": Format(answers.read_vllm, answers.write_vllm),
    "engine": Format(answers.read_vllm, answers.write_engine),
    "sglang": Format(answers.read_sglang, answers.write_sglang),
    "megatron": Format(megatron.read_megatron, megatron.write_megatron),
}
OF_ARRAYS = {"outrider": npz.is_outrider, "domains": npz.is_domains, "verl": verl.is_verl, "dump": npz.is_dump}
OF_RECORDS = {
    "megatron": megatron.is_megatron,
    "sglang": answers.is_sglang,
    "engine": answers.is_engine,
    "vllm": answers.is_vllm,
}


def read(path: Path, format: str | None = None, domain: str | None = None, ask: Ask | None = None) -> Routing:
    """One RL step's routing table.

    format   a name of FORMATS; None recognises it by content
    domain   only that domain's sequences; None: all, one domain after the other
    ask      what the file does not say by itself
    Layers that are no MoE layers are left out where the source numbers all layers. CallerError says what is wrong,
    in which file and line or key, and how to mend it.
    """
    if not path.exists():
        raise CallerError(f"{path}: no such file or folder. Name one that holds routes.")
    ask, name = ask or Ask(), format or recognise(path)
    routing = named(name).read(path, ask)
    if not routing.layers or not routing.top_k:
        raise CallerError(f"{path}: no row of routes in it. Was the recording switched on?")
    if ask.experts is None and name != "outrider":
        note = f"{routing.experts} experts: the largest id plus one"
        routing = msgspec.structs.replace(routing, notes=(*routing.notes, note))
    routing = without_dense(routing)
    return routing if domain is None else routing.domain(domain)


def convert(
    source: Path,
    target: Path,
    to: str = "outrider",
    format: str | None = None,
    domain: str | None = None,
    ask: Ask | None = None,
) -> Routing:
    """Read `source` and write it as `target` in the format `to`; returns the table.

    Routes, sequences and gaps are kept by every format. What only `outrider` keeps: domains, source ranks, layer
    numbers, the number of experts, replay and notes. CallerError also where the target cannot be written.
    """
    writer = named(to)
    routing = read(source, format, domain, ask)
    if target.resolve() == source.resolve():
        raise CallerError(f"{target}: is the file that is read. Name another one to write.")
    try:
        writer.write(routing, target)
    except OSError as error:
        raise CallerError(f"{target}: {error.strerror}. Name a place that can be written.") from error
    return routing


def named(name: str) -> Format:
    if name not in FORMATS:
        raise CallerError(f"format {name!r}: not known. Give one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def recognise(path: Path) -> str:
    """The format's name by content, never by the file's name. A folder is told by its first file."""
    first = npz.in_order(path, "*.npz", "*.jsonl", "*.json", "*.pt")[0]
    if verl.is_npz(first):
        keys = Npz(first).keys
        for name, fits in OF_ARRAYS.items():
            if fits(keys):
                return name
        raise CallerError(
            f"{first}: an npz with arrays {', '.join(keys[:8])}, which no reader takes. Give routes and offsets"
            " (NAME_ids, NAME_seq_offsets), or routed_experts with attention_mask or token ids."
        )
    if zipfile.is_zipfile(first):
        return "verl"  # torch.save writes a zip too
    with first.open("rb") as file:
        if file.read(2) == b"PK":
            raise CallerError(f"{first}: begins as a zip and does not end as one. Copy it again: it is cut off.")
    try:
        where, record = next(records(first))
    except CallerError as error:
        raise CallerError(
            f"{first}: neither npz, torch.save nor JSON ({error}). Known formats: {', '.join(FORMATS)}."
        ) from error
    for name, told in OF_RECORDS.items():
        if told(record):
            return name
    raise CallerError(
        f"{where}: keys {', '.join(list(record)[:8])}, which no reader takes. Give answers with routed_experts, or"
        " Megatron's records with top_indices."
    )
