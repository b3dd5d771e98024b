import pytest

from finetune.config import unsupported

QWEN = {"name": "qwen", "has": ["linear", "bias"]}


def cell(*needs, quantize=None):
    return {"model": QWEN, "method": {"name": "m", "needs": list(needs), "quantize": quantize}}


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_what_a_base_has_is_supported(quantize):
    assert unsupported(cell("linear", "bias", quantize=quantize)) is None
    assert unsupported(cell()) is None


def test_what_it_lacks_is_named():
    assert unsupported(cell("linear", "rope")) == "m needs rope, which qwen does not have"


def test_full_precision_is_what_a_quantized_base_lacks():
    assert unsupported(cell("full_precision")) is None
    said = unsupported(cell("linear", "full_precision", quantize="nf4"))
    assert said == "m needs full_precision, which qwen in nf4 does not have"


def test_choices_are_what_a_task_has_or_not():
    for fields, said in (
        ({"choices": "options"}, None),
        ({"choices": None}, "m needs a list of choices"),
        (None, "m needs"),
    ):
        found = unsupported({**cell("choices"), "task": {"name": "t", "fields": fields}})
        assert (found is None) if said is None else found.startswith(said)
