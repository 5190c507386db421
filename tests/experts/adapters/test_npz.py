"""Npz files: blocks that never make the whole, request dumps with warm-up rows, and what is wrong said by key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider.errors import CallerError
from outrider.experts.adapters import Ask, members, read
from outrider.experts.adapters.members import Npz


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.int64, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=6),
        elements=st.integers(0, 100),
    ),
    st.booleans(),
    st.integers(1, 64),
)
@settings(max_examples=80, deadline=None)
def test_blocks_put_together_are_the_array(
    tmp_path_factory: pytest.TempPathFactory, array: Any, fortran: bool, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, a=np.asfortranarray(array) if fortran else array, scalar=np.array(7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "BLOCK", block_bytes)  # so that small arrays take many blocks
        file = Npz(path)
        assert (file.whole("a") == array).all()
        assert file.whole("a").shape == array.shape
        assert int(file.whole("scalar")) == 7
        again = np.zeros_like(array)
        for index, at, block in file.planes("a"):
            again[index, at : at + len(block)] = block
        assert (again == array).all()
        members.write(path, {"a": array, "word": "abc"})
    with np.load(path) as plain:
        assert (plain["a"] == array).all()
        assert str(plain["word"]) == "abc"


def dump(path: Path, rows: int, prompt: int, output: int, first: int = 0) -> None:
    routes = (np.arange(rows)[:, None, None] + first + np.arange(4).reshape(2, 2)) % 60
    tokens = {"prompt_token_ids": np.zeros(prompt, int), "output_token_ids": np.zeros(output, int)}
    np.savez(path, request_id="r", routed_experts=routes.astype(np.int32), **tokens)


def test_a_folder_of_requests_is_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in (10, 9, 2):  # by name, 10 comes first
        dump(tmp_path / f"request_{i}.npz", rows=4, prompt=3, output=2, first=i)
    table = read(tmp_path)
    assert table.offsets_S1.tolist() == [0, 5, 10, 15]
    assert table.routes_TLK[[0, 5, 10], 0, 0].tolist() == [2, 9, 10]
    assert table.known().tolist() == [True, True, True, True, False] * 3  # the last token was never passed through


def test_warm_up_rows_are_left_out_only_when_they_are_named(tmp_path: Path) -> None:
    dump(tmp_path / "a.npz", rows=7, prompt=3, output=2)
    with pytest.raises(CallerError, match=r"a\.npz: 7 rows for 5 tokens.*warmup_rows"):
        read(tmp_path / "a.npz")
    table = read(tmp_path / "a.npz", ask=Ask(warmup_rows=2))
    assert table.routes_TLK[:, 0, 0].tolist() == [2, 3, 4, 5, 6]
    assert table.known_T is None
    assert read(tmp_path / "a.npz", ask=Ask(warmup_rows=3)).known().tolist() == [True] * 4 + [False]


def test_domains_say_which_array_does_not_fit(tmp_path: Path) -> None:
    path, ids = tmp_path / "x.npz", np.ones((2, 5, 3), np.uint8)
    np.savez(path, law_ids=ids, law_seq_offsets=[0, 4])
    with pytest.raises(CallerError, match="array 'law_seq_offsets': does not rise from 0 to the domain's 5 tokens"):
        read(path)
    np.savez(path, law_ids=ids, law_seq_offsets=[0, 5], code_ids=ids[:1], code_seq_offsets=[0, 5])
    with pytest.raises(CallerError, match=r"array 'code_ids': uint8 of shape \(1, 5, 3\)"):
        read(path)
    np.savez(path, law_ids=ids.astype(float), law_seq_offsets=[0, 5])
    with pytest.raises(CallerError, match="array 'law_ids': float64"):
        read(path)


def test_rows_missing_in_some_layers_of_a_domain(tmp_path: Path) -> None:
    ids = np.stack([np.arange(10).reshape(5, 2) % 7] * 2).astype(np.int64)
    ids[0, 1] = -1  # layer 0 only
    ids[:, 3] = -1  # all layers: the token is unknown
    np.savez(tmp_path / "x.npz", law_ids=ids, law_seq_offsets=[0, 5])
    table = read(tmp_path / "x.npz")
    assert table.routes_TLK.dtype == np.int8
    assert table.known().tolist() == [True, True, True, False, True]
    assert table.routes_TLK[1].tolist() == [[-1, -1], [2, 3]]


def test_a_cut_or_pickled_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, routed_experts=np.array([{}], dtype=object), attention_mask=np.ones((1, 1)))
    with pytest.raises(CallerError, match="'routed_experts': holds pickled objects"):
        read(path)
    np.savez(path, law_ids=np.ones((2, 500, 3), np.uint8), law_seq_offsets=[0, 500])
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)  # the stored bytes no longer match their checksum
    path.write_bytes(data)
    with pytest.raises(CallerError, match=r"array 'law_ids': .*Write"):
        read(path)
