"""The joint objective is the sum of two losses that others define, of one tower."""

from __future__ import annotations

import pytest
import torch
from dense_loss import dense_infonce, dense_sigmoid
from joint_clip import NUM_MASKED, JointParts, joint_parts
from torch import nn

from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.model.mim import MimModel, masked_tokens
from evatool.objective.clip import encode_pair
from evatool.objective.mim import MimObjective
from evatool.objective.terms.contrastive import SigmoidTerm
from evatool.objective.terms.mim import masked_positions
from evatool.recipe import schema
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate

KINDS = ["infonce", "sigmoid"]


def parts_apart(parts: JointParts) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of the batch by other code: the dense contrastive loss, and `pretrain-mim`'s model and objective."""
    objective, batch = parts.objective, parts.batch
    image, text = encode_pair(objective.model, batch)
    scale = objective.model.logit_scale.exp().squeeze()
    if isinstance(objective.terms[0], SigmoidTerm):
        contrastive = dense_sigmoid(image, text, scale, objective.logit_bias.squeeze(), None)
    else:
        contrastive = dense_infonce(image, text, scale, None)
    trunk = objective.model.visual.trunk
    student = MimModel(trunk, parts.config, objective.mim_head.out_features, patch_embed_grad_scale=1.0)
    student.mask_token, student.lm_head = objective.mask_token, objective.mim_head
    return contrastive, MimObjective(student, parts.teacher)(batch)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_of_its_parts(kind: str) -> None:
    parts = joint_parts(kind, weight=0.75)
    contrastive, mim = parts_apart(parts)
    found = parts.objective(parts.batch)
    assert set(found) >= {"loss", "contrastive_loss", "mim_loss", "i2t_top1", "t2i_top1", "logit_scale"}
    torch.testing.assert_close(found["contrastive_loss"], contrastive.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found["mim_loss"], mim.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found["loss"], contrastive + 0.75 * mim, rtol=1e-10, atol=0)

    named = dict(parts.objective.named_parameters())
    expected = torch.autograd.grad(contrastive + 0.75 * mim, list(named.values()))
    ours = torch.autograd.grad(found["loss"], list(named.values()))
    for name, ours_, expected_ in zip(named, ours, expected, strict=True):
        assert (ours_ - expected_).norm() <= 1e-10 * expected_.norm() + 1e-14, name
        assert float(expected_.norm()) > 0, name


def test_only_the_mask_token_and_the_head_are_not_the_model_s() -> None:
    parts = joint_parts("infonce")
    names = {f"model.{name}" for name in parts.objective.model.state_dict()}
    assert set(parts.objective.state_dict()) - names == {"mask_token", "mim_head.weight", "mim_head.bias"}


def test_masked_places_are_in_the_order_of_the_mask() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    places, is_place = masked_positions(mask, 3)
    assert places[0].tolist() == [1, 3, 4]
    assert places[1][0] == 0
    assert is_place.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    values = torch.arange(15).reshape(3, 5)
    assert values.gather(1, places)[is_place].tolist() == values[mask].tolist()


def losses_and_gradients(parts: JointParts, micro_batch_size: int) -> dict[str, torch.Tensor]:
    objective = parts.objective
    named = list(objective.named_parameters())
    groups = [ParamGroup("all", "other", None, 1e-3, 1.0, 0.0, [p for _, p in named], [name for name, _ in named])]
    engine = build_engine(
        schema.EngineSection(),
        World(0, 1, 0, torch.device("cpu")),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=None,
        optimizer=torch.optim.AdamW(groups[0].params, lr=0.0, fused=True),
        bounds=objective.parameter_bounds,
    )
    losses = forward_backward(
        engine, objective, parts.batch, micro_batch_size=micro_batch_size, seed=3, gate=SpikeGate(None)
    )
    return losses | {name: param.grad for name, param in named if param.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_give_the_whole_batch_s_gradient_and_the_teacher_runs_once(kind: str) -> None:
    whole = losses_and_gradients(joint_parts(kind), micro_batch_size=8)
    parts = joint_parts(kind)
    assert len(set(parts.batch.mask.sum(1).tolist())) > 1, "counts differ: a mean of means would be another loss"
    small = losses_and_gradients(parts, micro_batch_size=2)
    assert [len(seen) for seen in parts.teacher.seen] == [2, 2, 2, 2]
    assert small.keys() == whole.keys()
    for name, value in whole.items():
        assert (small[name] - value).norm() <= 1e-9 * value.norm() + 1e-14, name


def test_a_tower_that_drops_patches_is_refused() -> None:
    parts = joint_parts("infonce")
    trunk = parts.objective.model.visual.trunk
    trunk.patch_drop = nn.Identity()
    with pytest.raises(AssertionError, match="drops patches"):
        masked_tokens(trunk, torch.zeros(8, 3, 32, 32).double(), parts.batch.mask, parts.objective.mask_token)


def test_the_tiny_batch_has_masks_up_to_the_most() -> None:
    counts = joint_parts("infonce").batch.mask.sum(1)
    assert int(counts.max()) == NUM_MASKED
    assert int(counts.min()) >= 1
