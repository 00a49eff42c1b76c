"""The page: templates, style and scripts of `assets/` around a report, in a file that asks for no other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_rapo import __version__
from megatron_rapo.report import words
from megatron_rapo.report.contents import Report
from megatron_rapo.report.theme import DARK, LIGHT, declarations
from megatron_rapo.report.training import WINDOW

SCRIPTS = ("figures.js", "tables.js", "responses.js")


@dataclass(frozen=True)
class Section:
    """A section of the page; its template is `<id>.html.j2`."""

    id: str
    title: str

    @property
    def template(self) -> str:
        """File that it is made from."""
        return f"{self.id}.html.j2"


def render(report: Report) -> str:
    """The whole page as HTML. All text of the report is escaped; what is not, the assets and drawings are."""
    return render_page(
        _sections(report), scripts=SCRIPTS, packages=(), report=report, window=WINDOW, words=words
    )


def render_page(
    sections: Sequence[Section], *, scripts: Sequence[str], packages: Sequence[str], **values: Any
) -> str:
    """A page of `assets/page.html.j2` around sections, as HTML; all text is escaped.

    Args:
        sections: in order.
        scripts: files of `assets/`.
        packages: whose `assets/` have the sections' templates, before this room's.
        values: for the templates; `report` has `title` and `subtitle`.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "assets") for name in (*packages, "megatron_rapo.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    texts = [_asset(name) for name in scripts]
    return environment.get_template("page.html.j2").render(
        sections=sections,
        version=__version__,
        policy=_policy(texts),
        style=_asset("style.css"),
        light=Markup(declarations(LIGHT)),
        dark=Markup(declarations(DARK)),
        scripts=texts,
        **values,
    )


def _sections(report: Report) -> list[Section]:
    sections = {
        Section("summary", "Summary"): True,
        Section("training", "Training"): report.training,
        Section("timeline", "Timeline"): report.timelines,
        Section("frontier", "Frontier"): report.benchmarks,
        Section("ledger", "Ledger of problems"): any(report.against()),
        Section("hard", "Hard subset"): any(report.against()),
        Section("diagnostics", "Diagnostics"): report.diagnostics,
        Section("responses", "Responses"): report.browser,
        Section("configuration", "Configuration and versions"): report.configuration,
    }
    return [section for section, content in sections.items() if content]


def _asset(name: str) -> Markup:
    return Markup(files("megatron_rapo.report").joinpath("assets", name).read_text(encoding="utf-8"))


def _policy(scripts: list[Markup]) -> str:
    """A content security policy: these scripts alone run, and nothing is fetched from anywhere."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
