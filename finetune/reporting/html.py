"""A study -> report.html: one page that opens from the disk and fetches nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.reporting import assets
from finetune.reporting.browser import NUM_RANDOM, NUM_WORST
from finetune.reporting.columns import CONVENTION_TEXTS
from finetune.reporting.page_data import pack, packed_browser, page_data
from finetune.reporting.pages import below
from finetune.reporting.study import Study, has_other_scorers, state_counts, summary, tables
from finetune.reporting.tables import Entry, Table, to_frame
from finetune.reporting.text import one_line
from finetune.reporting.words import CHINESE, CONVENTIONS

FOLDER = Path(__file__).parent / "page"
SHOWN = ("health of the output", "overfitting", "forgetting and rewording", "Failed checks")  # the others are folded


def html_page(study: Study) -> str:
    """The page. All text from runs is either escaped by the template or inside the packed data."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["t"] = in_both_languages
    environment.filters["one_line"] = one_line
    template = environment.get_template("page.html")
    data = page_data(study)
    return template.render(
        name=study.folder.absolute().name,
        **_told(study),
        tables=tables(study),
        left_out=study.left_out,
        link=partial(_link, study=study),
        show=partial(html_table, study=study),
        is_shown=lambda table: table.topic in SHOWN,
        lead=data["lead"],
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        vega=Markup(assets.scripts().replace("</script", "<\\/script")),
        data=pack(data | {"figures": assets.specifications()}),
        browser=packed_browser(study),
    )


def in_both_languages(text: str) -> Any:
    """Markup that shows a word of the report in the page's language, and any other text as it is."""
    from markupsafe import Markup, escape

    other = CHINESE.get(text)
    both = Markup('<span class="en">{}</span><span class="zh" lang="zh">{}</span>')
    return both.format(text, other) if other else escape(one_line(text))


def html_table(table: Table, *, study: Study) -> Any:
    """The table as markup: words in both languages, each number linked to its run, best and alarming ones marked."""
    import pandas
    from markupsafe import Markup

    frame = to_frame(table, show=partial(_entry, study=study), title=in_both_languages)
    with pandas.option_context("display.max_colwidth", None):  # else long cells are cut in the middle of a tag
        made = frame.to_html(index=False, escape=False, border=0, justify="unset", classes=f"names-{table.num_names}")
    return Markup('<div class="scroll">{}</div>').format(Markup(made))


def _entry(entry: Entry, *, study: Study) -> Any:
    from markupsafe import Markup

    text = in_both_languages(entry.text)
    linked = Markup('<a href="{}">{}</a>').format(_link(entry.folder, study=study), text) if entry.folder else text
    if entry.alarm:
        return Markup('<span class="alarm">{}</span>').format(linked)
    return Markup("<b>{}</b>").format(linked) if entry.best else linked


def _told(study: Study) -> dict[str, Any]:
    """The sentences that depend on the study."""
    states = "，".join(f"{count} {CHINESE.get(state, state)}" for state, count in state_counts(study).items())
    left_out = f"；{len(study.left_out)} 个文件夹未能读取" if study.left_out else ""
    shared = f"；全部带有 {one_line('，'.join(study.shared))}" if study.shared else ""
    return {
        "summary": summary(study),
        "summary_chinese": f"{len(study.runs)} 次运行：{states}{shared}{left_out}",
        "convention": CONVENTION_TEXTS[study.convention].replace("`", ""),
        "convention_chinese": CONVENTIONS[study.convention],
        "other_scorers": has_other_scorers(study),
        "has_failed_checks": any(run.failed_checks for run in study.runs),
        "num_worst": NUM_WORST,
        "num_random": NUM_RANDOM,
    }


def _link(folder: Path, *, study: Study) -> str:
    return quote(below(folder, study.folder), safe="/+=,") + "/"
