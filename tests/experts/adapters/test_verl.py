"""veRL's batch: only the mask tells filler from expert 0, and only the rows that are replayed may be foreseen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider.errors import CallerError
from outrider.experts.adapters import Ask, from_verl, read
from outrider.experts.foresee import counts


def padded() -> dict[str, Any]:
    """Prompts padded on the left, responses on the right; filler is 0, a valid id."""
    routes = torch.zeros(2, 6, 2, 2, dtype=torch.int16)
    routes[0, 1:5] = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    routes[1, 2:4] = torch.tensor([[5, 6], [0, 7]], dtype=torch.int16)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    return {"routed_experts": routes, "attention_mask": mask, "response_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}


def test_padding_is_not_load_of_expert_0() -> None:
    table = from_verl(padded(), Ask(experts=8))
    assert table.offsets_S1.tolist() == [0, 4, 6]  # padding is no token
    assert table.known().tolist() == [True, True, True, False, True, False]  # the last row of each is filler
    assert counts(table, 1, microbatch_seqs=2)[0, :, 0].tolist() == [
        [0, 3, 3, 0, 0, 1, 1, 0],
        [1, 0, 0, 3, 3, 0, 0, 1],  # expert 0 where it was chosen, nowhere else
    ]


def test_r2_has_the_last_row_too() -> None:
    table = from_verl(padded(), Ask(replay="R2"))
    assert table.known_T is None
    assert not table.foreseen("recompute")


def test_a_sequence_without_response_is_not_replayed() -> None:
    batch = padded()
    batch["response_mask"][1] = 0
    assert from_verl(batch).known().tolist() == [True, True, True, False, False, False]


def test_a_replay_mask_has_the_last_word() -> None:
    batch = padded()
    batch["replay_mask"] = batch["attention_mask"].clone()
    batch["replay_mask"][0, 1] = 0
    assert from_verl(batch).known().tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_nested_batches_may_lack_the_last_row(dtype: torch.dtype) -> None:
    rows = [torch.full((4, 2, 2), 3, dtype=dtype), torch.full((3, 2, 2), 2, dtype=dtype)]
    for routes in rows:
        routes[:, :, 1] = 1
    batch = {
        "routed_experts": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
        "input_ids": torch.nested.as_nested_tensor([torch.zeros(5), torch.zeros(3)], layout=torch.jagged),
    }
    table = from_verl(batch)
    assert table.offsets_S1.tolist() == [0, 5, 8]
    assert table.known().tolist() == [True] * 4 + [False, True, True, False]
    assert table.routes_TLK[[0, 5], 0].tolist() == [[3, 1], [2, 1]]
    batch["response_mask"] = torch.tensor([[1, 0], [0, 0]])
    assert from_verl(batch).known().tolist() == [True] * 4 + [False] * 4
    batch["input_ids"] = torch.nested.as_nested_tensor([torch.zeros(6), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(CallerError, match=r"sequence 0: rows .* for 6 tokens. Only the last row may be missing"):
        from_verl(batch)


def test_the_same_batch_from_torch_save_and_npz(tmp_path: Path) -> None:
    torch.save(padded(), tmp_path / "batch.pt")
    np.savez(tmp_path / "batch.npz", **{key: value.numpy() for key, value in padded().items()})
    assert read(tmp_path / "batch.pt").same(from_verl(padded()))
    assert read(tmp_path / "batch.npz").same(from_verl(padded()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "filler 0 is a valid id. Give the mask"),
        ({"attention_mask": np.ones((2, 5))}, r"'attention_mask': shape \(2, 5\)"),
        ({"routed_experts": np.zeros((2, 6, 2))}, r"Give integers \[batch, prompt \+ response, layers, top_k\]"),
        ({"routed_experts": np.zeros((2, 6, 2, 2), np.uint8)}, "uint8 cannot hold ids of 512 experts, so they wrapped"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CallerError, match=message):
        from_verl({**padded(), **change}, Ask(experts=512))


def test_a_batch_without_routes_says_how_to_record_them(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="enable_rollout_routing_replay=True"):
        from_verl({"input_ids": torch.zeros(1)})
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CallerError, match=r"holds a list\. Save a dictionary"):
        read(tmp_path / "x.pt")
