"""Megatron's traces: stages in separate files, ranks that hold other tokens, micro-batches in order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts.adapters import Ask, read
from outrider.experts.foresee import counts

TOP_K = 2


def line(step: Any, layer: int, rank: int, first: int, tokens: int, **more: Any) -> str:
    """A record whose ids tell layer and token: 40 * layer + first + i, and one more."""
    top = [[40 * layer + first + i, 40 * layer + first + i + 1] for i in range(tokens)]
    head = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return json.dumps({**head, "num_tokens": tokens, "topk": TOP_K, "top_indices": top, **more})


def folder(path: Path, lines: list[tuple[int, str]]) -> Path:
    """One file a rank, as Megatron names them; rank 10 sorts behind rank 9."""
    path.mkdir()
    for rank in sorted({rank for rank, _ in lines}):
        text = "\n".join(text for r, text in lines if r == rank)
        (path / f"router_trace_rank{rank}.jsonl").write_text(text + "\n")
    return path


def trace(ranks: int, stage_layers: list[list[int]], micro_batches: list[int], steps: int = 1) -> list[tuple[int, str]]:
    """`ranks` in each stage; a micro-batch's tokens differ by rank, the same in every stage."""
    lines: list[tuple[int, str]] = []
    for stage, layers in enumerate(stage_layers):
        for within in range(ranks):
            rank, first = stage * ranks + within, 0
            for step in range(steps):
                for tokens in micro_batches:
                    lines += [(rank, line(step, layer, rank, first + 20 * within, tokens)) for layer in layers]
                    first += tokens
    return lines


def test_stages_are_merged_by_layer_and_ranks_by_token(tmp_path: Path) -> None:
    table = read(folder(tmp_path / "t", trace(2, [[1, 3], [0, 4]], [2, 3])))
    assert table.layer_ids == (0, 1, 3, 4)
    assert table.offsets_S1.tolist() == [0, 2, 4, 7, 10]  # micro-batch 0 of both ranks, then micro-batch 1
    assert table.source_T.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    token = np.array([0, 1, 20, 21, 2, 3, 4, 22, 23, 24])
    layer = np.array([0, 1, 3, 4])
    assert (table.routes_TLK[:, :, 0] == token[:, None] + 40 * layer).all()
    own = counts(table, 2, microbatch_seqs=2, own_source=True)
    assert own.shape[:3] == (2, 4, 2)
    assert own.sum(axis=(1, 3)).tolist() == [[16, 16], [24, 24]]
    assert table.notes == ("186 experts: the largest id plus one",)


def test_stages_that_count_layers_from_their_own_first(tmp_path: Path) -> None:
    """Forward hooks number layers within the stage: all ranks then name the same ones, and only the caller knows."""
    lines = trace(2, [[0, 1], [0, 1]], [3])
    path = folder(tmp_path / "t", lines)
    four = read(path)  # as four ranks with other tokens, and says so
    assert four.sequences == 4
    assert four.layers == 2
    assert "read as other tokens" in four.notes[0]
    two = read(path, ask=Ask(pipeline=2))
    assert (two.sequences, two.layers, two.layer_ids) == (2, 4, (0, 1, 2, 3))
    assert (two.routes_TLK[:, :2] == two.routes_TLK[:, 2:]).all()
    with pytest.raises(CallerError, match="4 ranks do not divide by pipeline 3"):
        read(path, ask=Ask(pipeline=3))


def test_stages_of_unequal_size_that_overlap_need_the_number_of_stages(tmp_path: Path) -> None:
    path = folder(tmp_path / "t", trace(1, [[0, 1, 2], [0, 1]], [3]))
    with pytest.raises(CallerError, match=r"overlapping layers.*--pipeline"):
        read(path)
    assert read(path, ask=Ask(pipeline=2)).layers == 5


def test_steps_and_rank_numbers_are_taken_in_order(tmp_path: Path) -> None:
    lines = [(rank, line(0, 0, rank, rank, 1)) for rank in range(11)]
    assert read(folder(tmp_path / "a", lines)).routes_TLK[:, 0, 0].tolist() == list(range(11))
    path = folder(tmp_path / "b", trace(1, [[0, 1]], [2], steps=3))
    assert read(path).routes_TLK[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert "several steps" in read(path).notes[0]
    assert read(path, ask=Ask(step=1)).routes_TLK[:, 0, 0].tolist() == [2, 3]
    with pytest.raises(CallerError, match="no record of step 7"):
        read(path, ask=Ask(step=7))


def test_prediction_heads_share_layer_numbers_and_are_left_out(tmp_path: Path) -> None:
    heads = [(0, line(0, 0, 0, 90, 2, block="mtp", mtp_idx=0)), (0, line(0, 1, 0, 90, 2, block="mtp"))]
    lines = [*heads, *trace(1, [[0, 1]], [2])]
    table = read(folder(tmp_path / "t", lines))
    assert table.routes_TLK[:, 0, 0].tolist() == [0, 1]
    assert "2 records of multi-token-prediction heads left out" in table.notes


def test_rows_missing_in_one_stage(tmp_path: Path) -> None:
    text = line(0, 1, 1, 0, 2, top_indices=[[-1, -1], [41, 42]])
    table = read(folder(tmp_path / "t", [(0, line(0, 0, 0, 0, 2)), (1, text)]))
    assert table.routes_TLK.tolist() == [[[0, 1], [-1, -1]], [[1, 2], [41, 42]]]
    assert table.known_T is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([(0, line(0, 0, 0, 0, 2)), (0, line(0, 1, 0, 0, 2)), (0, line(0, 0, 0, 2, 2))], "unequal records"),
        ([(0, line(0, 0, 0, 0, 2)), (1, line(0, 1, 1, 0, 3))], "micro-batch 0: 3 tokens, another stage has 2"),
        ([(0, line(0, 0, 0, 0, 2)), (1, line(0, 1, 1, 0, 2)), (2, line(0, 1, 2, 0, 2))], r"stages of \[1, 2\] ranks"),
        ([(0, line(0, 0, 0, 0, 2, num_tokens=3))], "not num_tokens 3 rows of 2"),
        ([(0, line(0, 0, 0, 0, 2)), (0, line(1, 0, 0, 0, 2, topk=3))], "top 3, the records before have top 2"),
        ([(0, line("x", 0, 0, 0, 2))], "line 1: .*Is the line whole"),
    ],
)
def test_traces_that_do_not_fit_are_refused(tmp_path: Path, lines: list[tuple[int, str]], message: str) -> None:
    with pytest.raises(CallerError, match=message):
        read(folder(tmp_path / "t", lines))
