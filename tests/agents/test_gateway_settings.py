"""Settings say what is wrong with them; the example in docs decodes and documents every key."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outrider.agents.settings import Foresight, GatewaySettings, Limits
from outrider.errors import CallerError

EXAMPLE = Path(__file__).parents[2] / "docs" / "outrider.toml"
URL = ("http://127.0.0.1:8001",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engines": ()}, "--engine"),
        ({"engines": ("not a url",)}, "not a url"),
        ({"engines": ("http://127.0.0.1:99999",)}, "http://host:port"),
        ({"engines": ("ftp://x",)}, "ftp://x"),
        ({"engines": ("http://u:secret@x",)}, "credentials"),
        ({"engines": (*URL, "http://127.0.0.1:8001/")}, "twice"),
        ({"engines": URL, "port": 70000}, "agents.port"),
        ({"engines": URL, "credit": 0}, "agents.credit"),
        ({"engines": URL, "oldest_share_every": 0}, "oldest_share_every"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CallerError) as raised:
        GatewaySettings(**options)
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)


def test_nested_settings_check_themselves() -> None:
    with pytest.raises(CallerError, match=r"agents\.limits\.connect_s"):
        Limits(connect_s=0)
    with pytest.raises(CallerError, match="between 0 and 1"):
        Foresight(quantile=1.0)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"engines": list(URL), "prot": 1}, GatewaySettings)
    with pytest.raises(msgspec.ValidationError, match="enum"):
        msgspec.convert({"engines": list(URL), "policy": "lifo"}, GatewaySettings)


def test_the_example_decodes_to_the_defaults_and_shows_every_key() -> None:
    example = tomllib.loads(EXAMPLE.read_text())["agents"]
    got = msgspec.convert(example, GatewaySettings)
    assert got == GatewaySettings(engines=got.engines), "the example shows the defaults"
    for kind, table in ((GatewaySettings, example), (Limits, example["limits"]), (Foresight, example["foresight"])):
        missing = set(kind.__struct_fields__) - set(table) - {"memory_attached"}  # set by --memory
        assert not missing
