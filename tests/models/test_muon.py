import pytest
import torch

from finetune.models.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)], ids=["square", "wide", "tall"])
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_singular_vectors_are_kept():
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix)
    turned = u.T @ orthogonal(matrix[None])[0] @ v.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


def test_a_quadratic_goes_down():
    goal = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([matrix], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (matrix - goal).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * goal.square().sum()
