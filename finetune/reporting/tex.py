"""A study -> report.tex: its tables for a paper, with booktabs."""

from __future__ import annotations

from finetune.reporting.study import Study, summary, tables
from finetune.reporting.tables import Entry, Table, to_frame
from finetune.reporting.text import latex

HEAD = """\
% {name}: {summary}
% \\input this file. It needs \\usepackage{{booktabs}}, and for Chinese names XeLaTeX with \\usepackage{{ctex}}."""


def tex_page(study: Study) -> str:
    """One table environment per table, in the order of the report."""
    name = latex(study.folder.absolute().name)
    head = HEAD.format(name=name, summary=latex(summary(study)))
    return "\n\n".join([head, *(tex_table(table) for table in tables(study))]) + "\n"


def tex_table(table: Table) -> str:
    """Names left, numbers right, the best of a column bold."""
    frame = to_frame(table, show=_entry, title=latex)
    made = frame.style.hide(axis="index").to_latex(
        hrules=True,
        caption=latex(table.title),
        position="ht",
        position_float="centering",
        column_format="l" * table.num_names + "r" * (len(table.header) - table.num_names),
    )
    return made.replace("\\centering", "\\centering\\small", 1).strip()


def _entry(entry: Entry) -> str:
    return rf"\textbf{{{latex(entry.text)}}}" if entry.best else latex(entry.text)
