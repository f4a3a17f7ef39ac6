"""Gradients of a contrastive loss over several ranks are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toy_run import ToyLoader, ToyObjective, toy_engine, toy_groups

from evatool.distributed.collectives import all_gather_with_grad, rank, world_size

pytestmark = pytest.mark.dist


def objective_gradients(kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and averaged gradients of the first toy batch, in float64."""
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0).double()
    engine = toy_engine(objective, toy_groups(objective), kind, clip=None)
    batch = next(iter(ToyLoader(rank=rank(), world_size=world_size())))
    losses = engine.forward(batch)
    engine.backward(losses["loss"])
    grads = {name: param.grad.clone() for name, param in objective.named_parameters()}
    return losses["loss"].item(), grads


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_equal_one_process(run_on_ranks, num_ranks):
    loss, expected = objective_gradients("auto")
    answers = run_on_ranks(objective_gradients, num_ranks, "ddp")
    assert sum(loss for loss, _ in answers) / num_ranks == pytest.approx(loss, rel=1e-12)
    for _, grads in answers:
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():  # measured worst case 4e-16
            torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-14, msg=name)


def gather_gradient(is_local: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's gathered features and the gradient of its rows, for a loss of own rows or of all rows."""
    torch.manual_seed(1)
    features = torch.randn(world_size() * 3, 5, dtype=torch.float64)
    own = features[rank() * 3 : rank() * 3 + 3].clone().requires_grad_()
    everyone = all_gather_with_grad(own)
    rows = own if is_local else everyone
    labels = torch.arange(len(rows)) + (rank() * 3 if is_local else 0)
    (F.cross_entropy(rows @ everyone.T, labels) / world_size()).backward()
    return everyone.detach(), own.grad


@pytest.mark.parametrize("is_local", [True, False], ids=["own rows", "all rows"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gather_sums_what_all_ranks_want(run_on_ranks, num_ranks, is_local):
    torch.manual_seed(1)
    features = torch.randn(num_ranks * 3, 5, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(features @ features.T, torch.arange(num_ranks * 3)).backward()
    for number, (everyone, grad) in enumerate(run_on_ranks(gather_gradient, num_ranks, is_local)):
        assert torch.equal(everyone, features.detach())
        torch.testing.assert_close(grad, features.grad[number * 3 : number * 3 + 3], rtol=1e-12, atol=1e-14)
