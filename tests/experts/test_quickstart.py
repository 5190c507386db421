"""The first thing a user runs: the docstring of outrider.experts, without torch."""

import re
import subprocess
import sys
from textwrap import dedent

import outrider.experts


def test_the_docstrings_quickstart_runs_and_balances() -> None:
    blocks = re.findall(r"\n\n((?:    .*\n|\n)+)", outrider.experts.__doc__ or "")
    code = dedent(blocks[0])
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code += "\nimport sys; assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = zip(*re.findall(r"max/mean ([\d.]+) -> ([\d.]+)", done.stdout), strict=True)
    assert all(float(b) > 1.2 and float(a) < 1.01 for b, a in zip(before, after, strict=True))
