import io

from rich.console import Console

from finetune.reporting.tables import Entry, Table
from finetune.reporting.terminal import print_table


def printed(table, *, width):
    console = Console(file=io.StringIO(), width=width)
    print_table(table, console=console)
    return console.file.getvalue()


def make_table(*, num_columns=6):
    header = ("model", "method", *(f"score {number}" for number in range(num_columns)))
    row = (Entry("qwen"), Entry("lora"), *(Entry(f"{number}2.34 ± 0.12") for number in range(num_columns)))
    return Table("clinic", "", header, (row,), num_names=2)


def test_a_narrow_terminal_loses_nothing():
    shown = printed(make_table(), width=42)
    assert all(f"{number}2.34 ± 0.12" in shown for number in range(6))
    assert max(map(len, shown.splitlines())) <= 42
    assert shown.count("qwen") == 3


def test_a_wide_terminal_has_one_line_a_row():
    assert printed(make_table(), width=120).count("qwen") == 1


def test_names_are_no_markup_and_no_escape_sequence():
    table = Table("[bold]x[/]", "", ("model", "score"), ((Entry("[red]\x1b[2Jqwen"), Entry("1")),), num_names=1)
    shown = printed(table, width=80)
    assert "[bold]x[/]" in shown
    assert "[red] [2Jqwen" in shown
    assert "\x1b" not in shown


def test_reasons_are_told_whole():
    reason = "loss is 1.2e+05 at step 3"
    table = Table("", "Without scores", ("method", "reason"), ((Entry("lora"), Entry(reason)),), num_names=2)
    assert reason in printed(table, width=80)


def test_what_all_rows_have_stands_in_the_title():
    names = ["lora+adapter.r=4+optim.max_steps=10", "none+optim.max_steps=10", "a+optim.max_steps=10+x=_~0123abcd"]
    table = Table("clinic", "", ("method", "score"), tuple((Entry(name), Entry("1")) for name in names), num_names=1)
    shown = printed(table, width=80)
    assert shown.startswith("clinic (all with optim.max_steps=10)\n")
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["lora+adapter.r=4", "none", "a+x=_~0123abcd"]
