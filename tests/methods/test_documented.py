"""The method that docs/methods.md shows is one, and a file that cannot be imported is told by its place."""

import textwrap

import pytest
import torch
from conftest import ARCHITECTURES, tiny_base
from exactness import assert_learns
from grid import attach, logits
from omegaconf import OmegaConf

import finetune.methods
from finetune.cells import CONF
from finetune.methods.build import build
from finetune.schema import Method as Schema

FILE, YAML = "`finetune/methods/norms.py`:", "and `conf/method/norms.yaml`:"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where methods are looked for, too."""
    monkeypatch.setattr(finetune.methods, "__path__", [*finetune.methods.__path__, str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_method_of_the_documentation(architecture, folder, examples):
    text = (CONF.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    code, rest = text.partition(FILE)[2].split(YAML)
    (folder / "norms.py").write_text(textwrap.dedent(code))
    lines = [line for line in rest.split("\n\n")[1].splitlines() if line.startswith("    ")]
    config = OmegaConf.to_container(OmegaConf.create(textwrap.dedent("\n".join(lines))))
    Schema.model_validate(config)
    model = attach(build(config), tiny_base(architecture))
    assert_learns(model, examples, lr=config["lr"]["tiny"])
    build(config).save(model, folder)
    again = build(config).load(tiny_base(architecture), folder)
    ids = torch.tensor([examples[1].ids])
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("code", "said"),
    [("x = 1\nclass Norms(Method):\n    pass\n", "2: NameError"), ("def :\n", "1: SyntaxError"), ("import nothing_such\n", "1: Mod")],
    ids=["name", "syntax", "import"],
)  # fmt: skip
def test_a_file_that_cannot_be_imported_is_told_by_its_place(code, said, folder):
    (folder / "broken.py").write_text(code)
    with pytest.raises(ValueError, match=rf"broken\.py:{said}"):
        build({"name": "broken", "adapter": {"_target_": "finetune.methods.broken.Norms"}})
