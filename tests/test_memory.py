import torch

from finetune.environment import peak_memory_gib
from finetune.memory import forget_peaks


def test_a_run_is_not_charged_with_the_memory_of_the_one_before():
    large = torch.ones(2**27)  # half a GiB
    before = peak_memory_gib(large.device)
    device = large.device
    del large
    forget_peaks()
    assert peak_memory_gib(device) < before - 0.4
