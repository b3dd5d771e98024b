import pytest
from grid import NAMES, OTHER_START, make

from finetune.methods.prefix import Prefix


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_whether_it_starts_as_the_base(name):
    method = make(name, "bloom")
    starts = method.starts_as_base and not isinstance(method, Prefix)  # whose `prefix_kv` says so
    assert starts == (name not in OTHER_START)
