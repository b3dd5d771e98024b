"""The command, on folders from a whole study to nothing at all."""

import csv
import io
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from finetune.report import main, make_studies, report

PAGES = ["report.csv", "report.html", "report.md", "report.tex"]


def run_report(root, *, study=None):
    console = Console(file=io.StringIO(), width=100)
    studies = make_studies(root, study=study, convention="words")
    return report(studies, root=root, wandb=None, console=console), console.file.getvalue()


def test_markdown_links_every_number_to_a_folder_that_exists(make_run, multirun):
    folder = make_run(method="lora+adapter.r=8", rouge=61.5)
    make_run(method="none", rouge=20.0, trainable=0)
    status, _ = run_report(multirun)
    page = (multirun / "main" / "report.md").read_text(encoding="utf-8")
    assert status == 0
    assert "**[61.50](clinic/qwen/lora+adapter.r=8/seed1)**" in page
    assert (multirun / "main" / "clinic/qwen/lora+adapter.r=8/seed1").samefile(folder)


def test_tables_survive_untrusted_text(make_run, multirun):
    evil = "out of | memory\n| <script>alert(1)</script> `x` \x1b[2J\u202e"
    make_run(method="lora", tasks=("NER | x", "<b>"))
    make_run(method="prefix", state="failed", reason=evil)
    _, shown = run_report(multirun)
    page = (multirun / "main" / "report.md").read_text(encoding="utf-8")
    assert "\x1b" not in shown + page
    assert "\u202e" not in shown + page
    assert "<script" not in page
    for block in page.split("\n\n"):
        rows = [line.replace(r"\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_csv_has_unrounded_numbers_per_kind_of_rows_and_no_formula(make_run, multirun):
    make_run(rouge=100 / 3, tasks=("NER", "=cmd|' /C calc'!A0"))
    make_run(method="prefix", state="failed", reason="@x")
    run_report(multirun)
    text = (multirun / "main" / "report.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["part"] for row in rows] == ["mean", "'=cmd|' /C calc'!A0", "NER", ""]
    assert float(rows[0]["rouge-1-multiset"]) == 100 / 3
    assert rows[0].get("peak_memory_gib", "") == ""
    assert (rows[3]["state"], rows[3]["reason"]) == ("failed", "error: @x")


def test_each_study_has_its_own_report(make_run, multirun):
    make_run(study="main")
    make_run(study="course", method="prefix")
    run_report(multirun)
    assert "prefix" not in (multirun / "main" / "report.md").read_text()
    assert "prefix" in (multirun / "course" / "report.md").read_text()


def test_one_study(make_run, multirun):
    make_run(study="main")
    make_run(study="course")
    run_report(multirun, study="course")
    assert [path.parent.name for path in multirun.rglob("report.md")] == ["course"]
    with pytest.raises(ValueError, match=r"no study 'curse'.*there are: course, main"):
        run_report(multirun, study="curse")


@pytest.mark.parametrize(
    ("root", "written"),
    [
        ("multirun", "multirun/main"),
        ("multirun/main", "multirun/main"),
        ("multirun/main/clinic", "multirun/main/clinic"),
    ],
)
def test_a_part_of_a_study_does_not_overwrite_its_report(make_run, tmp_path, root, written):
    make_run()
    run_report(tmp_path / root)
    assert [path.parent for path in tmp_path.rglob("report.md")] == [tmp_path / written]


def test_corrupt_folders_are_listed(make_run, multirun):
    make_run(method="lora")
    (make_run(method="dora") / "scores.json").write_text('{"scores"')
    status, shown = run_report(multirun)
    page = (multirun / "main" / "report.md").read_text()
    assert status == 0
    assert "left out" in shown
    assert "- [clinic/qwen/dora/seed1](clinic/qwen/dora/seed1): scores.json: " in page


def test_the_same_folders_give_the_same_pages(make_run, multirun):
    make_run()
    pages = []
    for _ in range(2):
        run_report(multirun)
        pages.append([(multirun / "main" / name).read_bytes() for name in PAGES])
    assert pages[0] == pages[1]
    assert sorted(path.name for path in (multirun / "main").iterdir()) == ["clinic", *PAGES]


def test_no_runs_yet(multirun, capsys):
    assert main([str(multirun)]) == 0
    assert capsys.readouterr().out.startswith("no runs yet: ")


def test_a_path_that_does_not_exist(tmp_path, capsys):
    assert main([str(tmp_path / "multirum")]) == 2
    assert "multirum is not a folder" in capsys.readouterr().err


def test_a_hundred_runs_without_torch(make_run, multirun):
    for number in range(100):
        make_run(model=f"model{number % 10}", method=f"method{number // 10}", rouge=number)
    code = "import sys; from finetune.report import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(status)"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(multirun)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "100 runs: 100 done" in done.stdout
    print(f"{time.monotonic() - started:.2f} s")
