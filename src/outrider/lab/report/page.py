"""Builds the page: what the journals hold becomes pictures, what the figures hold becomes numbers. Called by `write`.

One file, nothing fetched: style, script and data lie inside, and the page's own policy forbids everything else. Jinja
escapes all text: workflows, roles, errors and answers are not ours.
"""

import json
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import outrider
from outrider.lab.report import sections
from outrider.lab.report.numbers import Numbers
from outrider.lab.report.run import Journals, Run
from outrider.lab.report.totals import totals

ASSETS = files("outrider.lab.report") / "assets"


def render(run: Run, journals: Journals) -> str:
    """The whole page as text."""
    document = {"figures": run.figures, "read": totals(journals)}
    numbers = Numbers(document)
    environment = Environment(
        loader=PackageLoader("outrider.lab.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inert"] = inert
    script = (ASSETS / "page.js").read_text()
    return environment.get_template("page.html").render(
        run=run,
        version=outrider.__version__,
        document=document,
        numbers=numbers,
        css=Markup((ASSETS / "page.css").read_text()),
        script=Markup(script),
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        **sections.sections(run, journals, numbers),
    )


def inert(value: Any) -> Markup:
    """JSON that cannot end the <script> element it lies in, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
