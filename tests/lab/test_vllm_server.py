"""Where vLLM is looked for, and what is said where it is not; the servers themselves run in tests/vllm."""

import json
from pathlib import Path

import pytest

from outrider.errors import CallerError
from outrider.lab import vllm_server


def test_a_named_interpreter_is_taken_or_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    with pytest.raises(CallerError, match=r"no such file.*make \.venv-vllm"):
        vllm_server.find_python(python)
    python.touch()
    assert vllm_server.find_python(python) == python


def test_one_on_the_path_is_found_and_none_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "PLACE", "nowhere/bin/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CallerError, match="--vllm-python"):
        vllm_server.find_python(None)
    for name in ("vllm", "python"):
        (tmp_path / name).touch(mode=0o755)
    assert vllm_server.find_python(None) == tmp_path / "python"


def test_the_configuration_asks_vllm_to_recompute() -> None:
    said = json.loads(vllm_server.transfer_config(Path("/run/outrider.sock"), salt="tenant"))
    assert said["kv_load_failure_policy"] == "recompute"
    assert said["kv_connector_extra_config"] == {"socket": "/run/outrider.sock", "salt": "tenant"}
