"""The house rules as a test. Each failure names the file, the line and what to write instead."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "outrider"
FILES = sorted(SRC.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

CEILING = 400
OVER_CEILING: dict[str, str] = {  # path: why it may be longer
    "experts/kernels.py": "numba caches compiled code by one file: a change in a second one would go unseen",
}

BANNED = {  # word in a file, class or function name: what to write instead
    "utils": "the thing it does (keys, links, tiers)",
    "util": "the thing it does",
    "common": "the name of the idea that is shared",
    "base": "a Protocol named after what it can do",
    "core": "the system's name",
    "manager": "what it owns: Ledger, Store, Scheduler",
    "helper": "a verb: what the function does",
    "helpers": "a verb: what the function does",
}

SHELLS = {
    "move.py",
    "store.py",
    "server.py",
    "layer.py",
    "bank.py",
    "canonical.py",
    "balanced.py",
    "checkpoint.py",
    "copies.py",
    "dense.py",
    "exchange.py",
    "lane.py",
    "owners.py",
    "shared.py",
    "gateway.py",
    "journal.py",
    "metrics.py",
    "settings.py",
    "stack.py",
    "cli.py",
    "study.py",
    "commands.py",
    "options.py",
    "tables.py",
    "front.py",
    "draw.py",
    "places.py",
    "benchmark.py",
    "machine.py",
    "loopback.py",
}
SHELL_FOLDERS = {"tiers", "adapters", "lab"}
IMPURE = {  # module that a pure file may not import: what to do instead
    "time": "take `now` as an argument",
    "datetime": "take `now` as an argument",
    "random": "take the choice as an argument, or hash the name",
    "secrets": "take the choice as an argument",
    "os": "read it in settings.py or a door",
    "sys": "read it in a door",
    "socket": "do it in move.py or a door",
    "threading": "do it in move.py",
    "asyncio": "do it in move.py",
    "subprocess": "do it in lab/processes.py",
    "torch": "do it in layer.py, move.py or lab/",
    "logging": "return it: the journal tells all",
    "pathlib": "do it in a door",
    "uuid": "take the id as an argument",
}
THIRD_PARTY_IN_PURE = {"numpy", "numba", "msgspec", "sortedcontainers", "xxhash", "outrider"}

SYSTEMS = ("memory", "experts", "agents")
LEVELS = {"errors": 0, "topology": 1, "wants": 2, "ledger": 3, "journal": 3, "metrics": 4, "settings": 4}


def is_pure(path: Path) -> bool:
    parts = path.relative_to(SRC).parts
    return (
        path.name not in SHELLS and not SHELL_FOLDERS & set(parts) and path.name not in {"__init__.py", "__main__.py"}
    )


def where(path: Path, node: ast.AST | None = None) -> str:
    line = getattr(node, "lineno", 1)
    return f"{path.relative_to(ROOT)}:{line}"


def imported(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node, node.module)]
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_no_file_is_longer_than_the_ceiling() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        listed = str(path.relative_to(SRC)) in OVER_CEILING
        assert lines <= CEILING or listed, (
            f"{where(path)} has {lines} lines, ceiling {CEILING}: cut it where its ideas part"
        )


def test_the_engines_heart_fits_in_600_lines() -> None:
    """Schedule, cache and forward. The HTTP door, the model builders and the hook to memory are apart."""
    heart = [SRC / "lab" / "engine" / f"{name}.py" for name in ("engine", "scheduler", "blocks", "forward")]
    lines = sum(len(path.read_text().splitlines()) for path in heart)
    assert lines <= 600, f"lab/engine: {lines} lines of schedule, cache and forward, at most 600"


def test_every_file_says_what_it_is() -> None:
    for path in FILES:
        if path.name == "__init__.py" and not path.read_text().strip():
            continue
        assert ast.get_docstring(TREES[path]), (
            f"{where(path)}: begin with a docstring: what it does, pure or not, who calls it"
        )


def test_no_banned_name() -> None:
    for path in FILES:
        names: list[tuple[ast.AST | None, str]] = [(None, path.stem)]
        named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        names += [(node, node.name) for node in ast.walk(TREES[path]) if isinstance(node, named)]
        for node, name in names:
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
            for word in words:
                instead = BANNED.get(word.lower())
                assert instead is None, f"{where(path, node)}: {name!r} says {word!r}. Write {instead}"


@pytest.mark.parametrize("path", [p for p in FILES if is_pure(p)], ids=lambda p: str(p.relative_to(SRC)))
def test_pure_files_touch_nothing(path: Path) -> None:
    for node, module in imported(TREES[path]):
        top = module.split(".")[0]
        assert top not in IMPURE, f"{where(path, node)}: pure code imports {top}. Instead: {IMPURE[top]}"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.For | ast.comprehension):
            loop = node.iter
            is_set = isinstance(loop, ast.Set | ast.SetComp) or (
                isinstance(loop, ast.Call) and isinstance(loop.func, ast.Name) and loop.func.id in {"set", "frozenset"}
            )
            assert not is_set, (
                f"{where(path, loop)}: iterates a set: its order differs between runs. Iterate sorted(...)"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input", "id", "hash"}, (
                f"{where(path, node)}: pure code calls {node.func.id}(). Return the value and let a door do it"
            )


def test_pure_files_know_few_libraries() -> None:
    import sys

    for path in filter(is_pure, FILES):
        for node, module in imported(TREES[path]):
            top = module.split(".")[0]
            ok = top in sys.stdlib_module_names or top in THIRD_PARTY_IN_PURE
            assert ok, f"{where(path, node)}: pure code imports {top}. Move what needs it to a shell"


def test_import_law() -> None:
    """topology <- wants <- ledger <- {memory, experts, agents} <- {stack, lab} <- cli; no system imports another."""
    for path in FILES:
        parts = path.relative_to(SRC).with_suffix("").parts
        own = parts[0]
        for node, module in imported(TREES[path]):
            names = module.split(".")
            if names[0] != "outrider" or len(names) < 2:
                continue
            other = names[1]
            if own in SYSTEMS:
                bad = other in {"stack", "lab", "cli", "settings"} or (other in SYSTEMS and other != own)
            elif own in LEVELS:
                bad = other in {*SYSTEMS, "stack", "lab", "cli"} or (
                    LEVELS.get(other, 0) >= LEVELS[own] > 0 and other != own
                )
            else:
                bad = other == "cli" and own not in {"cli", "__main__"}
            if own == "settings":  # reads every system's settings struct
                bad = other in {"stack", "lab", "cli"}
            assert not bad, (
                f"{where(path, node)}: {own} imports outrider.{other}. They meet in wants.py; stack.py hands across"
            )


def test_third_parties_only_at_the_edge() -> None:
    """Engines and frameworks appear in adapters/, doors and lab/ alone."""
    engines = {"vllm", "sglang", "transformers", "megatron", "verl", "lmcache", "mooncake", "ray"}
    for path in FILES:
        parts = path.relative_to(SRC).parts
        if {"adapters", "lab"} & set(parts):
            continue
        for node, module in imported(TREES[path]):
            assert module.split(".")[0] not in engines, f"{where(path, node)}: {module} belongs in adapters/"


def test_no_promises() -> None:
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", line), (
                f"{path.relative_to(ROOT)}:{number}: a promise. Do it, or name what is left out in the docs"
            )
            assert not re.search(r"type: ignore\s*$", line), (
                f"{path.relative_to(ROOT)}:{number}: say which error is ignored"
            )


def test_no_silent_handlers() -> None:
    for path in FILES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{where(path, node)}: bare except. Name the exception"
                broad = isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
                silent = all(isinstance(child, ast.Pass) for child in node.body)
                assert not (broad and silent), (
                    f"{where(path, node)}: swallows everything. Name the exception and say what happens"
                )


def test_vllms_environment_has_what_memory_needs() -> None:
    """It is installed package by package, without dependencies: one that is missing there shows at its first import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints-vllm.txt").read_text(), re.MULTILINE)
    needed = [*project["dependencies"], *project["optional-dependencies"]["memory"]]
    missing = {re.split(r"[>=<\[]", one)[0] for one in needed} - {name.lower() for name in pinned}
    assert not missing, f"constraints-vllm.txt lacks {', '.join(sorted(missing))}: pin it as in constraints.txt"


def test_importing_outrider_is_quiet_and_light() -> None:
    import subprocess
    import sys

    code = (
        "import outrider, outrider.memory, outrider.experts, outrider.agents, sys;"
        "heavy = {'torch', 'transformers', 'numba', 'aiohttp'} & set(sys.modules);"
        "assert not heavy, f'import pulls {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not done.stderr
