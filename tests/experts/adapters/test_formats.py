"""Every format reads back what was written; counting cannot tell formats apart; a file is known by content."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_tables import routings

from outrider.errors import CallerError
from outrider.experts.adapters import FORMATS, Ask, convert, read
from outrider.experts.foresee import counts
from outrider.experts.routing import Routing


@given(routings(), st.sampled_from(sorted(FORMATS)), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_every_format_reads_back_what_was_written(routing: Routing, name: str, ranks: int) -> None:
    ask = Ask(experts=routing.experts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "routes"
        FORMATS[name].write(routing, path)
        again = read(path, ask=ask)  # recognised by content
        copy = Path(folder) / "copy"
        convert(path, copy, ask=ask)
        compact = read(copy)
    assert again.same(routing)
    assert compact.same(routing)
    assert (counts(again, ranks, microbatch_seqs=1) == counts(routing, ranks, microbatch_seqs=1)).all()


@given(routings(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_chain_of_conversions_loses_nothing(routing: Routing, data: st.DataObject) -> None:
    chain = data.draw(st.lists(st.sampled_from(sorted(FORMATS)), min_size=2, max_size=5))
    ask = Ask(experts=routing.experts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "first"
        FORMATS["outrider"].write(routing, path)
        for i, name in enumerate(chain):
            convert(path, target := Path(folder) / f"{i}", to=name, ask=ask)
            path = target
        assert read(path, ask=ask).same(routing)


@given(routings(), st.sampled_from(["R3", "R2"]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_our_own_file_keeps_everything(routing: Routing, replay: Any, seed: int) -> None:
    whole = Routing.of(
        routing.routes_TLK.copy(),
        routing.offsets_S1,
        experts=routing.experts + 3,
        known_T=routing.known(),
        replay=replay,
        source_T=np.random.default_rng(seed).integers(0, 300, routing.tokens),
        domains={"math": (0, 1), "code": (1, routing.sequences)},
        layer_ids=tuple(range(5, 5 + routing.layers)),
        notes=("said by a reader",),
    )
    with TemporaryDirectory() as folder:
        FORMATS["outrider"].write(whole, Path(folder) / "x")
        again = read(Path(folder) / "x")
        part = read(Path(folder) / "x", domain="code")
        with np.load(Path(folder) / "x") as plain:  # numpy alone reads it too
            assert (plain["routes"] == whole.routes_TLK).all()
    assert again.same(whole)
    for name in ("source_T", "domains", "layer_ids", "notes", "experts", "replay"):
        mine, theirs = getattr(whole, name), getattr(again, name)
        assert (mine == theirs).all() if name == "source_T" else mine == theirs
    assert part.same(whole.domain("code"))


def test_real_routes_count_the_same_in_every_format(routing: Any, tmp_path: Path) -> None:
    """DeepSeek-V2-Lite's routes; three layers and 20 of 33 sequences are enough for the wordy formats."""
    end = int(routing["law_seq_offsets"][20])
    cut = tmp_path / "cut.npz"
    np.savez(cut, law_ids=routing["law_ids"][:3, :end], law_seq_offsets=routing["law_seq_offsets"][:21])
    one = read(cut, domain="law", ask=Ask(experts=64))
    by_hand = np.zeros((10, 3, 8, 64), dtype=int)
    for m in range(10):
        start, stop = routing["law_seq_offsets"][2 * m], routing["law_seq_offsets"][2 * m + 2]
        for rank, run in enumerate(np.array_split(np.arange(start, stop), 8)):
            for layer in range(3):
                by_hand[m, layer, rank] = np.bincount(routing["law_ids"][layer, run].ravel(), minlength=64)
    for name in FORMATS:
        convert(cut, tmp_path / name, to=name)
        again = read(tmp_path / name, ask=Ask(experts=64))
        assert again.same(one)
        assert (counts(again, 8, microbatch_seqs=2) == by_hand).all(), name


def test_all_domains_follow_one_another(routing: Any) -> None:
    both = read(Path(routing.fid.name))
    assert list(both.domains) == ["intent", "law"]
    assert (both.tokens, both.layers, both.top_k, both.sequences) == (8222 + 8327, 26, 6, 127 + 33)
    assert both.routes_TLK.dtype == np.uint8
    assert both.routes_TLK.flags.c_contiguous
    law = read(Path(routing.fid.name), domain="law")
    assert (law.routes_TLK == routing["law_ids"].transpose(1, 0, 2)).all()
    assert (law.offsets_S1 == routing["law_seq_offsets"]).all()
    assert counts(both, 16, microbatch_tokens=1024).sum() == 16 * 1024 * 26 * 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", b"PK\x03\x04 not a zip", "begins as a zip and does not end as one"),
        ("x.json", b'{"choices": [', "neither npz, torch.save nor JSON"),
        ("x.json", b'{"choices": []}', r"keys choices, which no reader takes.*routed_experts"),
        ("x.json", b"[3]", "a int, not an object"),
        ("x.json", b"", "the file is empty"),
    ],
)
def test_what_no_reader_takes_is_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CallerError, match=message):
        read(tmp_path / name)


def test_an_npz_of_something_else_names_its_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=np.zeros(3), bias=np.zeros(1))
    with pytest.raises(CallerError, match=r"arrays weights, bias, which no reader takes"):
        read(tmp_path / "x.npz")
    with pytest.raises(CallerError, match=r"format 'parquet': not known. Give one of outrider, domains"):
        read(tmp_path / "x.npz", format="parquet")
    with pytest.raises(CallerError, match="no such file"):
        read(tmp_path / "y.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CallerError, match="in this folder"):
        read(tmp_path / "empty")


def test_converting_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    table = Routing.of(np.array([[[0, 1]], [[1, 2]]]))
    FORMATS["outrider"].write(table, tmp_path / "x")
    with pytest.raises(CallerError, match="is the file that is read"):
        convert(tmp_path / "x", tmp_path / "x")
    with pytest.raises(CallerError, match="Name a place that can be written"):
        convert(tmp_path / "x", tmp_path / "nowhere" / "y", to="vllm")
    with pytest.raises(CallerError, match=r"domain 'law': not in this table. It has none"):
        convert(tmp_path / "x", tmp_path / "y", domain="law")


def test_dense_layers_that_an_engine_numbers_too_are_left_out(tmp_path: Path) -> None:
    """SGLang's rows span all hidden layers; a dense one holds filler, which would count as load of expert 0."""
    routes = np.zeros((5, 3, 2), dtype=np.int32)
    routes[:, 1:] = [[0, 1], [2, 3]]
    table = Routing.of(routes)
    for name in ("sglang", "vllm", "verl", "dump", "outrider"):
        FORMATS[name].write(table, tmp_path / name)
        again = read(tmp_path / name)
        assert again.layer_ids == (1, 2), name
        assert (again.routes_TLK == routes[:, 1:]).all()
        assert "layers [0] hold one and the same id" in again.notes[-1]
