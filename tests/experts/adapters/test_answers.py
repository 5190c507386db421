"""Answers of vLLM, SGLang and our own engine: which rows are there, which are missing, and whose they are."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from outrider.errors import CallerError
from outrider.experts.adapters import Ask, from_sglang, from_vllm, read
from outrider.experts.foresee import counts
from outrider.lab.engine.request import Limits
from outrider.lab.engine.server import Door, bound

LAYERS, TOP_K = 2, 2


def rows(n: int, first: int = 0) -> Any:
    """[n, 2, 2]: row i holds first + i and three other ids, so that a shift by one shows."""
    return (np.arange(first, first + n)[:, None, None] + 20 * np.arange(4).reshape(2, 2)).astype(np.int32)


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def npy(array: Any) -> str:
    with io.BytesIO() as buffer:
        np.save(buffer, array)
        return base64.b64encode(buffer.getvalue()).decode()


def b64(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode()


def first_ids(table: Any) -> list[int | None]:
    """The first id of each token, None where it is unknown."""
    return [int(row[0, 0]) if known else None for row, known in zip(table.routes_TLK, table.known(), strict=True)]


def vllm(prompt: int, output: int, before: Any, after: Any, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return {"prompt_routed_experts": before, "choices": [{"index": 0, "routed_experts": after}], "usage": usage, **more}


def test_vllm_two_lists_with_the_last_rows_missing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x",
        vllm(3, 3, rows(3).tolist(), rows(2, 3).tolist()),
        vllm(2, 1, rows(2, 10).tolist(), []),  # aborted before the first token came back
        vllm(2, 2, rows(2, 13).tolist(), rows(2, 15).tolist()),  # every row is there
    )
    table = read(path)
    assert table.offsets_S1.tolist() == [0, 6, 9, 13]
    assert first_ids(table) == [0, 1, 2, 3, 4, None, 10, 11, None, 13, 14, 15, 16]


def test_vllm_choices_share_their_prompt(tmp_path: Path) -> None:
    answer = vllm(2, 4, npy(rows(2).astype(np.int16)), None)
    answer["choices"] = [
        {"index": 0, "routed_experts": npy(rows(1, 2)), "token_ids": [1, 2]},
        {"index": 1, "routed_experts": npy(rows(2, 5)), "token_ids": [3, 4]},
    ]
    assert first_ids(read(write(tmp_path / "x", answer))) == [0, 1, 2, None, 0, 1, 5, 6]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_vllm_one_array_ends_before_the_last_token(tmp_path: Path, dtype: Any) -> None:
    """The newer form: prompt and generated tokens in one array; a prompt prefix may be left out."""
    whole = {"choices": [{"routed_experts": npy(rows(4).astype(dtype))}]}
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    assert first_ids(read(write(tmp_path / "a", {**whole, **usage}))) == [0, 1, 2, 3, None]
    assert first_ids(read(write(tmp_path / "b", whole))) == [0, 1, 2, 3, None]  # without counts: one token more
    late = {"choices": [{"routed_experts": npy(rows(2, 2).astype(dtype))}]}
    assert first_ids(read(write(tmp_path / "c", {**late, **usage}))) == [None, None, 2, 3, None]
    assert first_ids(read(write(tmp_path / "d", {**late, "routed_experts_prompt_start": 2}))) == [
        None,
        None,
        2,
        3,
        None,
    ]


def test_rows_of_minus_one_are_missing_wherever_they_stand(tmp_path: Path) -> None:
    some = rows(3)
    some[1] = -1
    table = read(write(tmp_path / "x", vllm(3, 0, some.tolist(), [])))
    assert first_ids(table) == [0, None, 2]
    assert table.routes_TLK.dtype == np.uint8


def test_our_engines_answers(tmp_path: Path) -> None:
    """Both lists in the choice, a row for every token: the last one passes the model once more for it."""
    choice = {"prompt_routed_experts": rows(2).tolist(), "routed_experts": rows(2, 2).tolist()}
    answer = {"choices": [{"index": 0, **choice, "prompt_token_ids": [1, 2], "token_ids": [3, 4]}]}
    assert first_ids(read(write(tmp_path / "x", answer))) == [0, 1, 2, 3]
    (tmp_path / "pretty.json").write_text(json.dumps([answer, answer], indent=1))  # a list over many lines
    assert first_ids(read(tmp_path / "pretty.json")) == [0, 1, 2, 3] * 2


async def test_a_real_engines_answers(tmp_path: Path) -> None:
    """Answers over HTTP, as they came; the same prompt with twice the tokens begins with the same routes."""
    door = Door.open("tiny-moe", Limits(2048, 128, 4), "float32")
    sock = bound("127.0.0.1", 0)
    runner = await door.listen(sock)
    asked = {"prompt": "def main():", "temperature": 0, "return_routed_experts": True, "ignore_eos": True}
    texts = []
    async with aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}") as session:
        for tokens in (4, 8):
            async with session.post("/v1/completions", json={**asked, "max_tokens": tokens}) as answer:
                texts.append(await answer.text())
    await door.close(runner)
    (tmp_path / "answers.jsonl").write_text("\n".join(texts))
    table = read(tmp_path / "answers.jsonl")
    short, long = (json.loads(text)["choices"][0] for text in texts)
    prompt = len(short["prompt_token_ids"])
    assert table.offsets_S1.tolist() == [0, prompt + 4, 2 * prompt + 12]
    assert table.known_T is None
    assert table.routes_TLK[: prompt + 4].tolist() == short["prompt_routed_experts"] + short["routed_experts"]
    assert table.routes_TLK[prompt + 4 :].tolist() == long["prompt_routed_experts"] + long["routed_experts"]
    assert (table.routes_TLK[: prompt + 3] == table.routes_TLK[prompt + 4 :][: prompt + 3]).all()
    assert counts(table, 2, microbatch_seqs=2).sum() == table.routes_TLK.size
    assert from_vllm(json.loads(text) for text in texts).same(table)


def sglang(prompt: int, output: int, array: Any, start: int = 0, **more: Any) -> dict[str, Any]:
    info = {"prompt_tokens": prompt, "completion_tokens": output, "routed_experts": b64(array), **more}
    return {"text": "", "meta_info": {**info, "routed_experts_start_len": start}}


def test_sglang_shape_follows_from_counts_and_one_of_layers_and_top_k(tmp_path: Path) -> None:
    path = write(tmp_path / "x", sglang(3, 2, rows(4)))
    for ask in (Ask(layers=2), Ask(top_k=2), Ask(layers=2, top_k=2)):
        assert first_ids(read(path, ask=ask)) == [0, 1, 2, 3, None]
    with pytest.raises(CallerError, match=r"line 1, routed_experts: 16 ids for 5 tokens.*--layers.*--top-k"):
        read(path)
    with pytest.raises(CallerError, match="16 ids for 5 tokens"):
        read(path, ask=Ask(top_k=3))


def test_sglang_types_and_places(tmp_path: Path) -> None:
    small = sglang(3, 2, rows(4).astype(np.uint8), routed_experts_dtype="uint8")
    assert first_ids(read(write(tmp_path / "a", small), ask=Ask(top_k=2))) == [0, 1, 2, 3, None]
    chat = {
        "choices": [{"index": 0, "sgl_ext": {"routed_experts": b64(rows(4))}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert first_ids(read(write(tmp_path / "b", chat), ask=Ask(layers=2))) == [0, 1, 2, 3, None]
    assert first_ids(from_sglang([chat, small], Ask(top_k=2))) == [0, 1, 2, 3, None] * 2
    with pytest.raises(CallerError, match="answer 2, routed_experts: 16 ids"):
        from_sglang([small | {"meta_info": {**small["meta_info"], "routed_experts_shape": [2, 2]}}, chat])


def test_sglang_turns_are_stitched_by_session_and_never_guessed(tmp_path: Path) -> None:
    """Turn 2 sends rows from token 3 on: token 4 of turn 1 was passed through only then."""
    turns = [sglang(3, 2, rows(4), session_id="a"), sglang(7, 1, rows(4, 3), start=3, session_id="a")]
    other = sglang(2, 1, rows(2, 50), session_id="b")
    table = read(write(tmp_path / "x", turns[0], other, turns[1]), ask=Ask(top_k=2))
    assert table.offsets_S1.tolist() == [0, 8, 11]
    assert first_ids(table) == [0, 1, 2, 3, 4, 5, 6, None, 50, 51, None]
    alone = sglang(7, 1, rows(4, 3), start=3)
    assert first_ids(read(write(tmp_path / "y", alone), ask=Ask(top_k=2))) == [None, None, None, 3, 4, 5, 6, None]
    gap = sglang(9, 1, rows(3, 6), start=6, session_id="a")
    with pytest.raises(CallerError, match="line 2: rows start at token 6, the session's earlier answers end at 4"):
        read(write(tmp_path / "z", turns[0], gap), ask=Ask(top_k=2))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (vllm(5, 1, rows(3).tolist(), []), "line 1: 3 rows for 5 prompt tokens.*mark them by rows of -1"),
        (vllm(3, 1, rows(3).tolist(), rows(2).tolist()), "2 for 1 generated"),
        (vllm(3, 1, [[1, 2], [3]], []), "nested lists, or base64"),
        (vllm(3, 1, "!!!", []), "nested lists, or base64"),
        (vllm(3, 1, rows(3)[0].tolist(), []), r"Give integers \[tokens, layers, top_k\]"),
        ({"choices": [{"routed_experts": None}]}, "--enable-return-routed-experts"),
        ({"choices": [{"routed_experts": npy(rows(9))}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
         "9 rows from token 0 for 5 tokens"),
        (sglang(3, 2, rows(4)) | {"meta_info": {"routed_experts": None}}, '"return_routed_experts": true'),
        (sglang(3, 2, rows(4)) | {"meta_info": {"routed_experts": "abc"}}, "was the answer cut"),
        (sglang(3, 2, rows(7), routed_experts_shape=[2, 2]), "7 rows from token 0 for 5 tokens"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(CallerError, match=message):
        read(write(tmp_path / "x", record))


def test_a_cut_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x", vllm(3, 0, rows(3).tolist(), []))
    path.write_text(path.read_text() + '\n{"choices": [')
    with pytest.raises(CallerError, match=r"x, line 2: .*Is the line whole"):
        read(path)


def test_answers_of_two_models_do_not_mix(tmp_path: Path) -> None:
    path = write(tmp_path / "x", vllm(3, 0, rows(3).tolist(), []), vllm(3, 0, rows(3)[:, :1].tolist(), []))
    with pytest.raises(CallerError, match=r"sequence 2: rows of .*Give answers of one model"):
        read(path)
