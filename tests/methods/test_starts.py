import pytest
from grid import NAMES, OTHER_START, make


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_whether_it_starts_as_the_base(name):
    assert make(name, "bloom").starts_as_base == (name not in OTHER_START)
