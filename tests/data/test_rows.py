import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data import rows
from finetune.data.rows import Row

NO_FIXTURE_CHECK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELDS = {"task": "{task?}", "kind": "{kind?}", "prompt": "{prompt}", "target": "{target}", "id": "{id?}"}


def items(*numbers, **values):
    return [{"prompt": f"问{number}", "target": f"答{number}", **values} for number in numbers]


def task(path, *, fields=(), source=(), **keys):
    """A task's configuration over a JSON lines file."""
    reader = {"_target_": "finetune.data.sources.json_lines", "path": str(path), **dict(source)}
    return {"name": "mine", "version": 1, "source": reader, "fields": {**FIELDS, **dict(fields)}, **keys}


@pytest.fixture
def write(tmp_path):
    def write(items, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
        return path

    return write


def prompts(rows):
    return [row.prompt for row in rows]


# Laws of a split.


@NO_FIXTURE_CHECK
@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=2), st.text("xy", min_size=1, max_size=1)), min_size=4, max_size=30),
    st.sampled_from([{"valid_rows": 1}, {"train_rows": 2}, {"train_rows": 2, "valid_rows": 2}, {"valid_fraction": 0.3}]),
    st.booleans(),
)  # fmt: skip
def test_order_is_kept_no_row_is_on_both_sides_and_the_counts_are_right(tmp_path, pairs, rule, drop):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "target": target}) for prompt, target in pairs))
    configuration = task(path, drop_leaks=drop, **rule)
    try:
        split = rows.load(configuration)
    except ValueError as error:
        assert drop and "leaves no validation rows" in str(error)  # noqa: PT017, PT018
        return
    lines = [[int(row.id.removeprefix("data:")) for row in side] for side in (split.train, split.valid)]
    assert lines == [sorted(side) for side in lines]
    assert not set(lines[0]) & set(lines[1])
    assert [(row.prompt, row.target) for row in split.train] == [pairs[line - 1] for line in lines[0]]
    known = set(prompts(split.train))
    left = sum(row.prompt in known for row in split.valid)
    assert left == (0 if drop else split.notes["leaks"])
    used = [pairs[line - 1] for side in lines for line in side]
    assert split.notes == {
        "read": len(pairs),
        "bad": 0,
        "skipped": 0,
        "train": len(split.train),
        "valid": len(split.valid),
        "leaks": split.notes["leaks"],
        "dropped": split.notes["leaks"] if drop else 0,
        "duplicates": len(used) - len(set(used)),
    }
    assert rows.load(configuration) == split


def test_rows_in_file_order_first_train_then_valid(write):
    split = rows.load(task(write(items(*range(10))), train_rows=4, valid_rows=3))
    assert prompts(split.train) == ["问0", "问1", "问2", "问3"]
    assert prompts(split.valid) == ["问4", "问5", "问6"]
    assert split.train[0] == Row(id="data:1", task="mine", kind="instruction", prompt="问0", target="答0")


def test_a_file_of_validation_rows_of_its_own(write):
    train, valid = write(items(*range(5))), write(items(4, 5, 6), name="dev.jsonl")
    split = rows.load(task(train, source={"valid_path": str(valid)}, valid_fraction=0.5, drop_leaks=True, train_rows=5))
    assert prompts(split.train) == ["问0", "问1", "问2", "问3", "问4"]
    assert prompts(split.valid) == ["问5", "问6"]
    assert split.valid[0].id == "dev:2"
    with pytest.raises(ValueError, match=r"task\.valid_rows=4 does not fit: there are 3"):
        rows.load(task(train, source={"valid_path": str(valid)}, valid_rows=4))
    with pytest.raises(ValueError, match="are the same file"):
        rows.load(task(train, source={"valid_path": str(train)}))


def test_only_keeps_the_named_tasks_and_rows_are_counted_among_them(write):
    path = write([item for number in range(6) for item in items(number, task="甲乙"[number % 2])])
    split = rows.load(task(path, only=["乙"], train_rows=2, valid_rows=1))
    assert prompts((*split.train, *split.valid)) == ["问1", "问3", "问5"]
    with pytest.raises(ValueError, match="there are 3 rows"):
        rows.load(task(path, only=["乙"], train_rows=3, valid_rows=1))
    with pytest.raises(ValueError, match=r"task\.only: no rows of '丙' \(there are 乙, 甲\)"):
        rows.load(task(path, only=["丙"], valid_rows=1))


def test_a_leak_is_the_same_question_after_the_same_history(write):
    turns = [["你好", "您好"]]
    path = write([*items(1, 2), *items(1), *items(2, history=turns), {"prompt": " 问 1\n", "target": "x"}])
    split = rows.load(task(path, fields={"history": "history?"}, train_rows=2))
    assert (split.notes["leaks"], split.notes["duplicates"]) == (2, 1)
    dropped = rows.load(task(path, fields={"history": "history?"}, train_rows=2, drop_leaks=True))
    assert [row.history for row in dropped.valid] == [(("你好", "您好"),)]


def test_dropping_leaks_must_leave_a_row(write):
    with pytest.raises(ValueError, match="leaves no validation rows: all 1 occur in training"):
        rows.load(task(write(items(1, 1)), train_rows=1, drop_leaks=True))


# What identifies data and templates.


def test_the_data_hash_follows_the_content_and_not_the_file(write, tmp_path):
    first = rows.load(task(write(items(1, 2)), valid_rows=1))
    recoded = tmp_path / "other.jsonl"
    recoded.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items(1, 2)), encoding="gb18030")
    second = rows.load(task(recoded, source={"encoding": "gb18030"}, valid_rows=1))
    third = rows.load(task(write(items(2, 1)), valid_rows=1))
    assert first.data_hash == second.data_hash != third.data_hash
    assert re.fullmatch("[0-9a-f]{64}", first.data_hash)


def test_the_templates_hash_follows_fields_and_version(write):
    path = write(items(1, 2))
    same = [rows.load(task(path, valid_rows=1)), rows.load(task(path, train_rows=1))]
    other = [
        rows.load(task(path, valid_rows=1, fields={"prompt": "问：{prompt}"})),
        rows.load({**task(path, valid_rows=1), "version": 2}),
    ]
    assert len({split.templates_hash for split in same}) == 1
    assert len({split.templates_hash for split in (*same, *other)}) == 3


# What is wrong is named by file and line, together.


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "a"}, "no key 'target'"),
        ({"prompt": "a", "target": ""}, "the target is empty; task.skip_empty=true"),
        ({"prompt": "a", "target": " \u3000\n"}, "the target is empty"),
        ({"prompt": "a", "target": None}, "the target is empty"),
        ({"prompt": "", "target": "b"}, "the prompt is empty"),
        ({"prompt": "a", "target": 3}, "key 'target' must be text, found int"),
        ({"prompt": ["a"], "target": "b"}, "key 'prompt' must be text, found list"),
        ({"prompt": "a", "target": "好\ud800"}, "half a surrogate pair (U+D800) after"),
        ({"prompt": "a\0b", "target": "b"}, "a NUL character after"),
        ({"prompt": "a", "target": "b", "id": True}, "key 'id' must be text, found bool"),
        ({"prompt": "a", "target": "b", "id": "first"}, "id 'first' stands already in line 1"),
        ({"prompt": "a", "target": "b", "choices": "是的"}, "key 'choices' must be a list"),
        ({"prompt": "a", "target": "b", "choices": [1]}, "the choices must be texts"),
        ({"prompt": "a", "target": "b", "choices": [""]}, "the choices must be texts"),
        (
            {"prompt": "a", "target": "b", "history": [["q"]]},
            "the history must be [question, answer] pairs of texts, found ['q']",
        ),
        ({"prompt": "a", "target": "b", "history": [["q", None]]}, "the history must be [question, answer] pairs"),
        ({"prompt": "a", "target": "b", "history": ["qa"]}, "the history must be [question, answer] pairs"),
        ({"prompt": "a", "target": "b", "history": {"q": "a"}}, "key 'history' must be a list, found dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_row_is_named_by_file_and_line(write, item, message):
    path = write([*items(1, id="first", choices=["x"], history=[]), item, *items(2)])
    lists = {"choices": "choices?", "history": "history?"}
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: {message}')}"):
        rows.load(task(path, fields=lists, valid_rows=1))


def test_twenty_wrong_rows_are_listed_with_the_total(write):
    with pytest.raises(ValueError, match=r"^25 problems:") as caught:
        rows.load(task(write(items(*range(25), target="")), valid_rows=1))
    assert len(str(caught.value).splitlines()) == 22
    assert str(caught.value).endswith("and 5 more")


def test_a_key_that_no_row_has_is_one_problem_of_the_file(write):
    path = write(items(*range(25)))
    with pytest.raises(ValueError, match="did you mean 'prompt'") as caught:
        rows.load(task(path, fields={"prompt": "{promt}", "target": "{answer}"}, valid_rows=1))
    assert str(caught.value).splitlines()[0] == "2 problems:"
    assert str(caught.value).count(f"{path}:1: no key") == 2


def test_wrong_fields_are_refused_before_the_file_is_opened():
    with pytest.raises(ValueError, match=r"^2 problems:\ntask\.fields.promt is not a field"):
        rows.load(task("nowhere", fields={"promt": "x", "target": "{a!r}"}))
    with pytest.raises(ValueError, match=r"task\.fields\.target is not set"):
        rows.load({**task("nowhere"), "fields": None})


def test_empty_rows_are_left_out_and_counted_when_asked(write):
    path = write([*items(1), {"prompt": "a", "target": ""}, {"prompt": None, "target": "b"}, *items(2)])
    split = rows.load(task(path, skip_empty=True, valid_rows=1))
    assert (split.notes["read"], split.notes["skipped"]) == (4, 2)
    assert [row.id for row in (*split.train, *split.valid)] == ["data:1", "data:4"]


# Generated rows.


@pytest.fixture
def generator(monkeypatch):
    def read(*, train_rows, valid_rows, seed=0):
        rows = items(*range(train_rows)) + items(*range(100, 100 + valid_rows))
        return [{**row, "task": "甲乙"[number % 2]} for number, row in enumerate(rows)]

    module = types.ModuleType("finetune.data.generated")
    read.__module__ = module.__name__
    module.read = read
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}.read"


def test_a_generator_fixes_the_sides_and_only_chooses_among_them(generator):
    source = {"_target_": generator, "train_rows": 6, "valid_rows": 4}
    configuration = {**task("-"), "source": source, "train_rows": 6, "valid_rows": 4}
    split = rows.load(configuration)
    assert (prompts(split.train)[-1], prompts(split.valid)[0]) == ("问5", "问100")
    assert split.train[0].id == "generated:1"
    some = rows.load({**configuration, "only": ["乙"]})
    assert (prompts(some.train), prompts(some.valid)) == (["问1", "问3", "问5"], ["问101", "问103"])
    with pytest.raises(ValueError, match=r"task\.source\.train_rows is null"):
        rows.load({**configuration, "source": {**source, "train_rows": None}})
    with pytest.raises(ValueError, match=r"task\.valid_fraction is for files"):
        rows.load({**configuration, "valid_fraction": 0.1})


# The committed tasks.

CONF = Path(__file__).parents[2] / "conf" / "task"
KEYS = {"name", "version", "source", "fields", "only", "train_rows", "valid_rows", "valid_fraction", "skip_empty"}
KEYS |= {"rewordings", "on_bad_row", "max_bad_share", "drop_leaks", "max_prompt_tokens", "max_target_tokens"}


def committed(name, **overrides):
    """A task file as the command line composes it, with dotted overrides."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    data_dir = os.environ.get("FINETUNE_DATA", "data")
    with initialize_config_dir(config_dir=str(CONF.parent), version_base="1.3"):
        composed = compose(overrides=[f"+task={name}", f"+data_dir={data_dir}"])
    for key, value in overrides.items():
        OmegaConf.update(composed.task, key.replace("__", "."), value)
    return OmegaConf.to_container(composed.task, resolve=True)


TASKS = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_all_keys_and_good_templates(name):
    configuration = committed(name)
    assert configuration["name"] == name
    assert set(configuration) == KEYS
    assert rows.templates.problems(configuration["fields"]) == []


@pytest.mark.parametrize("name", TASKS)
def test_every_key_of_a_task_carries_a_comment(name):
    lines = (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if re.match(r" *\w+: .", line) and not line.startswith("defaults")]
    assert [line for line in keys if " # " not in line] == []


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        pytest.param(
            [{"instruction": "判断意图", "input": "医生：多久了？", "output": "询问", "history": [["q", "a"]]}],
            [("判断意图\n医生：多久了？", "询问", (("q", "a"),))],
            id="instruction-input-output-history",
        ),
        pytest.param([{"instruction": "问", "input": "", "target": "答"}], [("问", "答", ())], id="instruction-target"),
        pytest.param([{"instruction": "问", "output": "答"}], [("问", "答", ())], id="no-input"),
        pytest.param([{"prompt": "问", "target": "答"}], [("问", "答", ())], id="prompt-target"),
        pytest.param(
            [{"prompt": "问", "target": "答", "history": None}, {"prompt": "问", "target": "答", "history": [["q", "a"]]}],
            [("问", "答", ()), ("问", "答", (("q", "a"),))],
            id="history-null",
        ),
    ],
)  # fmt: skip
def test_jsonl_takes_the_keys_that_the_file_has(write, items, expected):
    split = rows.load(
        committed("jsonl", source__path=str(write([*items, items[0]])), valid_fraction=None, valid_rows=1)
    )
    assert [(row.prompt, row.target, row.history) for row in split.train] == expected
    assert {(row.task, row.kind) for row in split.train} == {("jsonl", "instruction")}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"instruction": "a", "output": "b", "target": "c"}, "both 'output' and 'target' occur"),
        ({"input": "a", "target": "c"}, "no key 'instruction' or 'prompt'"),
        ({"prompt": "a", "target": "b", "histroy": []}, "no key 'history' for task.fields.history; did you mean 'histroy'"),
    ],
    ids=["two-targets", "no-prompt", "typing-error"],
)  # fmt: skip
def test_jsonl_names_what_it_cannot_decide(write, item, message):
    path = write([item, item])
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: {message}")):
        rows.load(committed("jsonl", source__path=str(path)))


def test_jsonl_asks_for_a_file():
    with pytest.raises(ValueError, match=r"no data file is named: task\.source\.path=FILE"):
        rows.load(committed("jsonl"))


def test_alpaca_zh_joins_instruction_and_input(tmp_path):
    path = tmp_path / "alpaca_zh.json"
    path.write_text(json.dumps([{"instruction": f"译{n}", "input": "x" * (n % 2), "output": "o"} for n in range(40)]))
    split = rows.load(committed("alpaca_zh", source__path=str(path)))
    both = {row.id: row.prompt for row in (*split.train, *split.valid)}
    assert [both[f"alpaca_zh:{number}"] for number in (1, 2, 3)] == ["译0", "译1\nx", "译2"]
    assert len(both) == 40


def test_rows_of_a_json_list_in_one_line_are_named_by_their_number(tmp_path):
    path = tmp_path / "alpaca_zh.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b" * (n != 2)} for n in range(4)]))
    with pytest.raises(ValueError, match=re.escape(f"{path}:1 (row 3): the target is empty")):
        rows.load(committed("alpaca_zh", source__path=str(path)))


def test_rows_are_read_without_torch():
    code = "import sys, finetune.data.rows; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Real data.

real = pytest.mark.skipif(
    "FINETUNE_DATA" not in os.environ, reason="needs real data: set FINETUNE_DATA to their folder"
)


@real
def test_the_medical_dialogues_are_split_as_the_original_did():
    split = rows.load(committed("medical_dialogue"))
    counts = {
        "read": 7644,
        "bad": 0,
        "skipped": 0,
        "train": 5000,
        "valid": 2000,
        "leaks": 12,
        "dropped": 0,
        "duplicates": 359,
    }
    assert split.notes == counts
    assert split.train[0].prompt.startswith("我有高血压这两天女婿来的时候")
    assert (split.train[0].id, split.train[0].kind) == ("chinese_medical_dialogue_neike:2", "dialogue")
    dropped = rows.load(committed("medical_dialogue", drop_leaks=True))
    assert (len(dropped.train), len(dropped.valid)) == (5000, 1988)
    assert {row.id for row in dropped.valid} < {row.id for row in split.valid}


@real
def test_the_medical_file_in_the_wrong_encoding_names_the_right_one():
    with pytest.raises(ValueError, match=r"neike\.csv:2: .*task\.source\.encoding=gb18030"):
        rows.load(committed("medical_dialogue", source__encoding="utf-8"))


@real
def test_all_duplicates_of_the_medical_file_are_counted():
    assert rows.load(committed("medical_dialogue", train_rows=7000, valid_rows=None)).notes["duplicates"] == 396


def toy(name, **overrides):
    path = str(Path(os.environ["FINETUNE_DATA"]) / "promptcblue_toy_train.jsonl")
    return rows.load(committed(name, source__path=path, **overrides))


@real
def test_the_promptcblue_examples_have_five_rows_of_each_of_sixteen_tasks():
    split = toy("promptcblue", valid_fraction=0.2)
    every = (*split.train, *split.valid)
    assert set(Counter(row.task for row in every).values()) == {5}
    assert len({row.task for row in every}) == 16
    assert len({row.id for row in every}) == len(every) == 80
    assert {bool(row.choices) for row in every if row.kind in ("cls", "matching")} == {True}


@real
def test_the_three_tasks_of_the_original_experiment():
    split = toy("promptcblue_three", valid_fraction=0.3)
    assert Counter(row.task for row in (*split.train, *split.valid)) == {
        "IMCS-V2-DAC": 5,
        "CMeEE-V2": 5,
        "IMCS-V2-MRG": 5,
    }


def test_reworded_rows_are_the_validation_rows_with_another_prompt():
    task = committed("clinic", train_rows=9, valid_rows=6)
    own, others = rows.load(task).valid, rows.reworded(task, task["rewordings"][0])
    assert [replace(row, prompt="") for row in own] == [replace(row, prompt="") for row in others]
    assert all(one.prompt != other.prompt for one, other in zip(own, others, strict=True))


def test_a_rewording_that_is_no_template_is_refused():
    task = {**committed("clinic", train_rows=9, valid_rows=6), "rewordings": ["{input"]}
    with pytest.raises(ValueError, match="prompt"):
        rows.load(task)
