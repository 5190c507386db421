"""Every mistake in a TOML file is one sentence: what, where, how to mend it."""

from pathlib import Path

import msgspec
import pytest

from outrider import settings
from outrider.errors import CallerError


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    connect_s: float = 1.0


class Agents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    port: int = 8000
    engines: list[str] = []
    timeouts: Inner = Inner()


def read(tmp_path: Path, text: str, **overrides: object) -> Agents:
    path = tmp_path / "outrider.toml"
    path.write_text(text)
    return settings.read(path, "agents", Agents, overrides)


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    got = read(tmp_path, "[agents]\nport = 1\n[agents.timeouts]\nconnect_s = 2.5\n", port=2, engines=None)
    assert (got.port, got.engines, got.timeouts.connect_s) == (2, [], 2.5)
    assert settings.read(None, "agents", Agents, {"port": 3}).port == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[agents]\nprot = 1\n", "line 2: unknown key 'prot' in [agents]. Did you mean 'port' in [agents]?"),
        ("[agents]\nzzz = 1\n", "line 2: unknown key 'zzz' in [agents]. Known keys of [agents]: port, engines"),
        ("[agents]\nport = 'x'\n", "line 2: agents.port: Expected `int`, got `str`. Mend the value"),
        ("[agents.timeouts]\nconnect_s = 'x'\n", "line 2: agents.timeouts.connect_s: Expected `float`, got `str`."),
        (
            "[agents]\nconnect_s = 1\n",
            "line 2: unknown key 'connect_s' in [agents]. Did you mean 'connect_s' in [agents.timeouts]?",
        ),
        ("[agents]\nport = 1\n[agents.timeouts]\nport = 2\n", "line 4: unknown key 'port' in [agents.timeouts]"),
        ("[memory]\nx = 1\n", "line 1: unknown table 'memory'."),
        ("[agent]\nport = 1\n", "line 1: unknown table 'agent'. Known tables: [agents]."),
        ("port = 1\n", "line 1: unknown key 'port'. Known tables"),
        ("[agents\n", "broken TOML: "),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CallerError) as raised:
        read(tmp_path, text)
    assert says in str(raised.value)
    assert "outrider.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match=r"config .*no\.toml: No such file or directory"):
        settings.read(tmp_path / "no.toml", "agents", Agents, {})


def test_a_bad_option_is_named_as_one() -> None:
    with pytest.raises(CallerError, match=r"^options: agents\.port: "):
        settings.read(None, "agents", Agents, {"port": "x"})
