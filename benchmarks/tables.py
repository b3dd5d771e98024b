"""Lines of the other benchmarks -> Markdown for docs/benchmarks.md. The last line of each kind counts.

python -m benchmarks.tables benchmarks.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.formula import ANSWERS, CELLS, EPOCHS, ROWS, grid_seconds, seconds

Line = Mapping[str, Any]
GROWTH = (500, 2000, 8000)  # training rows
DECODERS = ("generate", "places")  # transformers', this project's


def main() -> None:
    """Print every table that the lines allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    files = parser.parse_args().files
    print("\n\n".join(document([json.loads(text) for file in files for text in file.read_text().splitlines()])))


def document(lines: Sequence[Line]) -> list[str]:
    """The tables with their titles, and what failed."""
    good = [line for line in lines if "failed" not in line]
    found = [_about(good)]
    for title, make in (
        ("Steady training", training),
        ("Tokens/s of this project to a peer's, of the last halves", ratios),
        (f"Whole cells, seconds ({ROWS} rows x {EPOCHS} epochs, {ANSWERS} answers, by the formula)", cells),
        (f"Grids of {CELLS} cells, seconds, by the formula", grids),
        ("How cost grows, seconds, by the formula", growth),
        ("The formula and real cells", checks),
        ("Memory", memory),
        ("A step's milliseconds on the GPU, and its kernels", kernels),
        ("Decoding, new tokens/s", decoding),
        ("Logits at once", logits),
        ("The demo cell on a CPU", demo),
    ):
        if table := make(good):
            found.append(f"### {title}\n\n{table}")
    last = {tuple(x.get(name) for name in ("what", "shape", "who", "times", "rows")): x for x in lines}
    failed = [x for x in last.values() if "failed" in x]
    found += [f"failed: {x['shape']} {x.get('who', x['what'])}: {x['failed'][-300:]}" for x in failed]
    return found


def training(lines: Sequence[Line]) -> str:
    """Rates, memory and start-up of every contender."""
    rows = [
        (x["shape"], x["who"], _times(x), _thousands(x["tokens_per_second"]),
         _thousands(x.get("late_tokens_per_second")), f"{x['steps_per_second']:.1f}", f"{x['peak_gib']:.1f}",
         f"{x['start_up_seconds']:.0f}", f"{x['first_loss']:.2f}")
        for x in _latest(lines, what="training")
    ]  # fmt: skip
    return table(
        "shape|contender|rows' length|tokens/s|of the last half|steps/s|peak GiB|start-up s|first loss", rows, words=3
    )


def ratios(lines: Sequence[Line]) -> str:
    """This project's rate over each peer's at the peer's own number of rows."""
    known = [x for x in _latest(lines, what="training") if x["times"] == 1]
    rates = {(x["shape"], x["who"]): x.get("late_tokens_per_second", x["tokens_per_second"]) for x in known}
    pairs = [
        ("compiled", "trl"), ("compiled", "trl-tuned"), ("compiled", "trainer"), ("compiled-4", "peft"),
        ("compiled-128", "trl-tuned-32"), ("compiled-128", "trl-tuned-64"), ("compiled-64", "trl-tuned-16"),
        ("graph", "trl"), ("eager", "trl"),
    ]  # fmt: skip
    pairs += [(own, f"{peer}-no-cudnn") for own, peer in pairs]
    shapes = list(dict.fromkeys(shape for shape, _ in rates))
    rows = []
    for own, peer in pairs:
        found = [_ratio(rates.get((shape, own)), rates.get((shape, peer))) for shape in shapes]
        if any(found):
            rows.append((f"{own} to {peer}", *found))
    return table("|".join(["", *shapes]), rows, words=1)


def cells(lines: Sequence[Line]) -> str:
    """What was measured of a LoRA cell, and what follows; a real one counts for more than a short one."""
    rows, real = [], [line for line in _latest(lines, what="check") if line["rows"] == ROWS]
    known = {(line["shape"], line["who"]) for line in real}
    for x in [*real, *(x for x in _latest(lines, what="cell") if (x["shape"], x["who"]) not in known)]:
        if list(x["cells"]) != ["lora"]:
            continue
        cell = x["cells"]["lora"]
        rows.append(
            (x["shape"], x["who"], f"{x['wall_seconds']:.0f}", f"{cell['num_steps']}", f"{cell['answers']}",
             f"{cell['start_up_seconds']:.0f}", _thousands(cell["tokens_per_second"]),
             f"{1000 * cell['seconds_an_answer']:.0f}", f"{seconds(x):.0f}")
        )  # fmt: skip
    head = "shape|contender|measured: s|steps|answers|start-up s|tokens/s|ms an answer|whole cell s"
    return table(head, rows, words=2)


def grids(lines: Sequence[Line]) -> str:
    """Of commands with all cells, and of single cells one after the other."""
    usable = [x for x in _latest(lines, what="cell") if len(x["cells"]) in (1, CELLS)]
    rows = [
        (x["shape"], x["who"], f"{len(x['cells'])}", f"{x['wall_seconds']:.0f}", f"{grid_seconds(x):.0f}")
        for x in usable
    ]
    return table("shape|contender|cells measured|s|grid s", rows, words=2)


def growth(lines: Sequence[Line]) -> str:
    """With the rows (answers stay) and with the cells."""
    rows = []
    for x in _latest(lines, what="cell"):
        if list(x["cells"]) == ["lora"]:
            by_rows = [f"{seconds(x, num_rows=number):.0f}" for number in GROWTH]
            rows.append((x["shape"], x["who"], *by_rows, f"{5 * seconds(x):.0f}", f"{20 * seconds(x):.0f}"))
    head = "|".join([*(f"{number} rows" for number in GROWTH), f"5 cells of {ROWS}", "20 cells, one command each"])
    return table(f"shape|contender|{head}", rows, words=2)


def checks(lines: Sequence[Line]) -> str:
    """Real cells beside what the formula says of them."""
    short = {(x["shape"], x["who"]): x for x in _latest(lines, what="cell") if list(x["cells"]) == ["lora"]}
    rows = []
    for x in _latest(lines, what="check"):
        if (basis := short.get((x["shape"], x["who"]))) and (cell := x["cells"].get("lora")):
            more = seconds({**basis, "wall_seconds": 0.0}, num_rows=x["rows"], answers=cell["answers"])
            said, real = basis["wall_seconds"] + more, x["wall_seconds"]
            rows.append((x["shape"], x["who"], f"{x['rows']}", f"{said:.1f}", f"{real:.1f}", f"{said / real - 1:+.0%}"))
    return table("shape|contender|rows|formula s|real s|deviation", rows, words=2)


def memory(lines: Sequence[Line]) -> str:
    """Peaks of the optimizers and of QLoRA, as shares of the first of their kind."""
    peaks = {(x["shape"], x["who"]): x["peak_gib"] for x in _latest(lines, what="training") if x["times"] == 1}
    rows = []
    for (shape, who), peak in peaks.items():
        plain = "full-adamw" if "adamw_8bit" in who else who.removeprefix("qlora-")
        if who != plain and (whole := peaks.get((shape, plain))):
            rows.append((shape, who, plain, f"{peak:.1f}", f"{whole:.1f}", f"{1 - peak / whole:.0%}"))
    return table("shape|contender|compared with|peak GiB|its peak GiB|less", rows, words=3)


def kernels(lines: Sequence[Line]) -> str:
    """By kind; gaps are of the traced steps."""
    found = {(x["shape"], x["rows"]): x for x in lines if x["what"] == "kernels"}
    names = list(dict.fromkeys(name for x in found.values() for name in x["ms"]))
    rows = [
        (shape, f"{count}", f"{x['step_ms']:.1f}", f"{x['step_tokens']:.0f}", f"{x['traced_ms']:.1f}",
         f"{x['traced_tokens']:.0f}", f"{x['gaps_ms']:.1f}",
         *(f"{x['ms'][name]:.1f} in {x['kernels'][name]:.0f}" if name in x["ms"] else "" for name in names))
        for (shape, count), x in found.items()
    ]  # fmt: skip
    return table(
        "|".join(["shape", "rows", "step ms", "tokens", "traced ms", "tokens", "gaps ms", *names]), rows, words=1
    )


def decoding(lines: Sequence[Line]) -> str:
    """This project's rates beside those of `generate`."""
    rates: dict[tuple[Any, ...], dict[str, Line]] = {}
    for x in lines:
        if x["what"] == "decoding":
            rates.setdefault((x["shape"], x["weights"], x["rows"]), {})[x["decoder"]] = x
    rows = []
    for (shape, weights, count), found in rates.items():
        if len(found) == len(DECODERS):
            theirs, ours = (found[name]["tokens_per_second"] for name in DECODERS)
            equal = f"{found[DECODERS[1]]['equal']}"
            rows.append((shape, weights, f"{count}", _thousands(theirs), _thousands(ours), _ratio(ours, theirs), equal))
    return table("shape|LoRA|rows|`generate`|this project|ratio|rows alike", rows, words=2)


def logits(lines: Sequence[Line]) -> str:
    """Memory and time of one pack, by the number of logits at once."""
    found = {(x["shape"], x["tokens"], x["at_once"]): x for x in lines if x["what"] == "logits"}
    rows = [
        (shape, at_once, f"{tokens}", f"{x['supervised']}", f"{x['peak_gib']:.1f}", f"{x['ms']:.0f}")
        for (shape, tokens, at_once), x in found.items()
    ]
    return table("shape|logits at once|tokens|supervised|peak GiB|ms", rows, words=2)


def demo(lines: Sequence[Line]) -> str:
    """The last one measured."""
    found = [x for x in lines if x["what"] == "demo cell"]
    if not found:
        return ""
    x = found[-1]
    kinds = (
        ("training, real tokens/s", "tokens_per_second", "ratio tokens_per_second"),
        ("answers/s", "answers_per_second", "ratio answers_per_second"),
        ("the whole cell, s, from these rates", "cell_seconds", "ratio cell"),
    )
    rows = [
        (title, *(f"{x[f'{who} {key}']:.0f}" for who in ("trainer", "ours")), f"{x[ratio]:.1f}")
        for title, key, ratio in kinds
    ]
    return table("|`Trainer`|this project|ratio", rows, words=1)


def table(head: str, rows: Iterable[Sequence[str]], *, words: int) -> str:
    """Markdown; the first `words` columns are words, the others numbers. Empty without rows."""
    names = head.split("|")
    rows = list(rows)
    if not rows:
        return ""
    marks = ["---" if number < words else "--:" for number in range(len(names))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (names, marks, *rows))


def _latest(lines: Iterable[Line], *, what: str) -> list[Line]:
    """The last of every contender's lines of one kind."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line["what"] == what:
            key = (line["shape"], line["who"], line.get("times"), line.get("rows"), tuple(line.get("cells", ())))
            found[key] = line
    return list(found.values())


def _about(lines: Sequence[Line]) -> str:
    """Hardware, versions, days and commands."""
    places = {x["hardware"]: None for x in lines}
    versions = {f"{name} {number}": None for x in lines for name, number in x["versions"].items()}
    commands = {f"    {x['command']}": None for x in lines}
    days = sorted({x["date"] for x in lines})
    return "\n".join([f"{'; '.join(places)}; {', '.join(versions)}; {', '.join(days)}", "", *commands])


def _times(line: Line) -> str:
    return f"x {line['times']:g}"


def _thousands(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1000:.1f} k"


def _ratio(own: float | None, peer: float | None) -> str:
    return f"{own / peer:.1f}" if own and peer else ""


if __name__ == "__main__":
    main()
