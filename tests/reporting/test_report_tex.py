import shutil
import subprocess

import pytest

from finetune.reporting.read import read_all
from finetune.reporting.study import make_study
from finetune.reporting.tex import tex_page
from finetune.reporting.text import latex


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 % & more_x #1 {y} $z$", r"50 \% \& more\_x \#1 \{y\} \$z\$"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("61.00 ± 0.50 – <x>", r"61.00 $\pm$ 0.50 -- \textless{}x\textgreater{}"),
        ("[x] 1", "{}[x] 1"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
    ],
)
def test_escapes(text, expected):
    assert latex(text) == expected


@pytest.fixture
def page(make_run, multirun):
    for method, rouge in (("none", 20.0), ("lora_x", 60.0)):
        make_run(method=method, rouge=rouge)
    make_run(method="full", state="failed", reason=r"100 % \\ of & memory_x #1 ^ ~ { [y]")
    runs, left_out = read_all(multirun)
    return tex_page(make_study(multirun / "main", runs=runs, left_out=left_out, convention="words"))


def test_every_row_has_every_column(page):
    for table in page.split(r"\begin{table}")[1:]:
        columns = table.split(r"\begin{tabular}{")[1].split("}")[0]
        body = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {len(columns)}
        assert table.count(r"\toprule") == table.count(r"\midrule") == table.count(r"\bottomrule") == 1


def test_the_best_is_bold(page):
    assert r"\textbf{60.00}" in page
    assert r"\textbf{20.00}" not in page


def test_it_compiles(page, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("needs LaTeX and booktabs")
    document = (
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
        + page
        + r"\end{document}"
    )
    (tmp_path / "report.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
