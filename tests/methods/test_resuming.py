"""Every method goes on after a kill as if nothing was: what its steps change is in a checkpoint."""

import pytest
from grid import NAMES, config, stored_base, tokenizer
from test_resume import Killed, same, train


@pytest.mark.parametrize("name", NAMES)
def test_every_method_goes_on_as_if_nothing_was(name, examples, tmp_path):
    found = config(name, "qwen2")["method"]
    case = {"adapter": found["adapter"], "lr": found["lr"]["tiny"], "neftune_alpha": 5.0, "batch_rows": 6}

    def run(folder, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        base = stored_base("qwen2", quantize=found["quantize"], folder=tmp_path / folder / "base")
        return train(tmp_path / folder, examples, base=base, tokenizer=tokenizer, **case, **changes)

    whole = run("whole", minutes=9.0)
    with pytest.raises(Killed):
        run("killed", dies_in=7)
    same(run("killed"), whole)
