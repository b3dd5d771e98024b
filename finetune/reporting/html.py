"""A study -> report.html: one page that opens from the disk and fetches nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from finetune.reporting import assets
from finetune.reporting.page_data import pack, packed_browser, page_data
from finetune.reporting.pages import below
from finetune.reporting.study import Study, summary, tables
from finetune.reporting.tables import Table
from finetune.reporting.text import one_line
from finetune.reporting.words import CHINESE

FOLDER = Path(__file__).parent / "page"


def html_page(study: Study) -> str:
    """The page. All text from runs is either escaped by the template or inside the packed data."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["chinese"] = CHINESE.get
    environment.filters["one_line"] = one_line
    return environment.get_template("page.html").render(
        name=study.folder.absolute().name,
        summary=summary(study),
        tables=tables(study),
        left_out=study.left_out,
        link=partial(_link, study=study),
        is_health=_is_health,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        vega=Markup(assets.scripts().replace("</script", "<\\/script")),
        data=pack(page_data(study) | {"figures": assets.specifications()}),
        browser=packed_browser(study),
    )


def _link(folder: Path, *, study: Study) -> str:
    from urllib.parse import quote

    return quote(below(folder, study.folder), safe="/+=,") + "/"


def _is_health(table: Table) -> Any:
    return table.topic == "health of the output"
