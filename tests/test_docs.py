"""The docs say what is true: the CLI page is generated, claims name tests that exist, the README's code runs."""

import os
import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from outrider.cli import app

ROOT = Path(__file__).parents[1]
WRITE = os.environ.get("OUTRIDER_GOLDEN") == "write"


def commands(command: TyperCommand | TyperGroup, name: str) -> list[tuple[str, TyperCommand]]:
    if isinstance(command, TyperGroup):
        return [pair for key, child in sorted(command.commands.items()) for pair in commands(child, f"{name} {key}")]
    return [(name, command)]


def leaves() -> list[tuple[str, TyperCommand]]:
    return commands(typer.main.get_command(app), "outrider")


def cli_page() -> str:
    """docs/cli.md: every command with its options, from the same strings as --help."""
    page = ["# Command line", "", "Generated from `--help` by `make docs`; a test fails when it is stale.", ""]
    for name, command in leaves():
        page += [f"## `{name}`", "", command.help or "", "", "| option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            if isinstance(parameter, TyperOption) and parameter.name != "help":
                default = "" if parameter.default is None or parameter.required else f"`{parameter.default}`"
                need = "required" if parameter.required else default
                page.append(f"| `{', '.join(parameter.opts)}` | {parameter.help} | {need} |")
            elif isinstance(parameter, TyperArgument):
                page.append(
                    f"| `{(parameter.name or '').upper()}` | {getattr(parameter, 'help', '') or ''} | required |"
                )
        page += ["", (command.epilog or "").replace("Example:  ", "Example: `") + "`", ""]
    return "\n".join(page)


def test_the_cli_page_is_fresh() -> None:
    path = ROOT / "docs" / "cli.md"
    if WRITE:
        path.write_text(cli_page())
    assert path.read_text() == cli_page(), "docs/cli.md is stale: run `make docs`"


@pytest.mark.parametrize(("name", "command"), leaves(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_help_and_an_example(name: str, command: TyperCommand) -> None:
    assert command.help, f"{name} has no help"
    assert (command.epilog or "").startswith(f"Example:  {name} "), f"{name} shows no example of itself"
    for parameter in command.params:
        if isinstance(parameter, TyperOption):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def test_every_claim_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "claims.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, function in named:
        path = ROOT / file
        assert path.exists(), f"docs/claims.md names {file}, which does not exist"
        if function:
            assert re.search(rf"\b{function}\b", path.read_text()), f"docs/claims.md names {file}::{function}"


def test_every_law_is_listed_and_tested() -> None:
    """docs/invariants.md numbers the laws; each row names a test file that exists."""
    text = (ROOT / "docs" / "invariants.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, tests in rows:
        files = re.findall(r"`(tests/[\w/.]+\.py)`", tests)
        assert files, f"law {number} names no test"
        assert all((ROOT / file).exists() for file in files), f"law {number}: {files}"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(3))
def test_the_readmes_python_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = python_blocks()[number]
    assert len(block.splitlines()) <= 14, "a ten-line quickstart"
    exec(compile(block, f"README block {number}", "exec"), {})


def test_the_example_config_decodes() -> None:
    from outrider import settings
    from outrider.agents.settings import GatewaySettings

    settings.read(ROOT / "docs" / "outrider.toml", "agents", GatewaySettings, {})
