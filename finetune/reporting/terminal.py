"""Tables -> a terminal. Lines are set here: rich's own table took 1 s for a hundred runs, this takes 0.1 s."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from finetune.reporting.cells import without_shared
from finetune.reporting.tables import Table
from finetune.reporting.text import one_line

GAP = "  "
NAMES = ("task", "model", "method")  # columns whose names have suffixes; others may be any text


def print_table(table: Table, *, console: Console) -> None:
    """Print a table; one that is too wide goes on below itself with the names repeated, so that nothing is cut off.

    What was changed on the command line for every row stands in the title alone.
    """
    header = [title.split() for title in table.header]
    rows = [[(one_line(entry.text), entry.best) for entry in row] for row in table.rows]
    shared: list[str] = []
    for column in range(table.num_names):
        if table.header[column] not in NAMES:
            continue
        names, common = without_shared([row[column][0] for row in rows])
        shared += common
        for row, name in zip(rows, names, strict=True):
            row[column] = (name, row[column][1])
    widths = [
        max(map(cell_len, (*header[column], *(row[column][0] for row in rows)))) for column in range(len(table.header))
    ]
    told = f" (all with {', '.join(shared)})" if shared else ""
    lines = [Text(one_line(table.title) + told, style="bold")]
    for columns in _pieces(widths, num_names=table.num_names, width=console.width):
        places = [(column, widths[column], column < table.num_names) for column in columns]
        lines += [*_header_lines(header, places), *(_line(row, places) for row in rows), Text()]
    console.print(Text("\n").join(lines), soft_wrap=True)


def _pieces(widths: Sequence[int], *, num_names: int, width: int) -> list[list[int]]:
    """Columns by piece: each piece has the names, and as many of the numbers as fit the width, or one."""
    names = list(range(num_names))
    pieces: list[list[int]] = [[]]
    for column in range(num_names, len(widths)):
        taken = sum(widths[other] + len(GAP) for other in (*names, *pieces[-1], column)) - len(GAP)
        if taken > width and pieces[-1]:
            pieces.append([])
        pieces[-1].append(column)
    return [names + piece for piece in pieces]


def _header_lines(header: Sequence[Sequence[str]], places: Sequence[tuple[int, int, bool]]) -> list[Text]:
    """One word a line, so that a long title does not widen its column; the last words stand on the last line."""
    from_below = zip_longest(*(reversed(header[column]) for column, _, _ in places), fillvalue="")
    lines = [zip(words, places, strict=True) for words in from_below][::-1]
    return [Text(GAP.join(_pad(word, *place[1:]) for word, place in line).rstrip(), style="dim") for line in lines]


def _line(row: Sequence[tuple[str, bool]], places: Sequence[tuple[int, int, bool]]) -> Text:
    line = Text()
    for index, (column, width, is_name) in enumerate(places):
        text, is_best = row[column]
        line.append(GAP * (index > 0) + _pad(text, width, is_name), style="bold green" if is_best else None)
    line.rstrip()
    return line


def _pad(text: str, width: int, is_name: bool) -> str:
    """Names to the left, numbers to the right; a Chinese character is two cells wide."""
    padding = " " * (width - cell_len(text))
    return text + padding if is_name else padding + text
