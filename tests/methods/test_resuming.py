"""Every method goes on after a kill as if nothing was: what its steps change is in a checkpoint."""

import pytest
from grid import NAMES, config, stored_base, tokenizer
from test_resume import Killed, same, train

CORE = ("monteclora", "velora")  # draw ahead, keep buffers; test_resume has those of the field


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CORE else pytest.mark.faults) for n in NAMES])
def test_every_method_goes_on_as_if_nothing_was(name, examples, tmp_path):
    found = config(name, "qwen2")["method"]
    if name == "monteclora":
        found["adapter"]["monteclora_config"]["buffer_size"] = 5  # is drawn anew within the run
    case = {"adapter": found["adapter"], "lr": found["lr"]["tiny"], "neftune_alpha": 5.0, "batch_rows": 6}

    def run(folder, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        base = stored_base("qwen2", quantize=found["quantize"], folder=tmp_path / folder / "base")
        return train(tmp_path / folder, examples, base=base, tokenizer=tokenizer, **case, **changes)

    whole = run("whole", minutes=60)
    with pytest.raises(Killed):
        run("killed", dies_in=7)
    same(run("killed", minutes=60), whole)
