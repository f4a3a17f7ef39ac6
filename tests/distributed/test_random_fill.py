"""Numbers that torch leaves out on the meta device are replayed by a deferred build, in their place in the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evatool.distributed.engines.meta_init import InitialWeights, MetaBuild
from evatool.distributed.engines.random_fill import trunc_normal_


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.token = nn.Linear(7, 5), nn.Parameter(torch.empty(1, 1, 4000))
        trunc_normal_(self.token, std=0.8)  # wide enough that numbers are rejected and drawn again
        self.layer = nn.Linear(32, 64)
        trunc_normal_(self.layer.weight, std=0.02)
        self.after = nn.Linear(3, 3)


def built(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(Head().state_dict())


def test_it_draws_torch_s_own_numbers() -> None:
    torch.manual_seed(3)
    nn.Linear(7, 5)
    expected = nn.init.trunc_normal_(torch.empty(1, 1, 4000), std=0.8)
    assert torch.equal(built(3)["token"], expected)
    assert expected.abs().max() <= 2


def test_a_deferred_build_has_the_numbers_of_a_real_one() -> None:
    expected = built(3)
    torch.manual_seed(3)
    build = MetaBuild()
    with torch.device("meta"), build:
        head = Head()
    weights = InitialWeights(head, build, {})
    for name in reversed(list(expected)):  # in any order
        assert torch.equal(weights[name], expected[name]), name
