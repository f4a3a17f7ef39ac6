from __future__ import annotations

import math

import pytest
import torch
from golden import MIM_FILES, TOLERANCE, read_golden, relative
from tiny_clip import TinyPatchTeacher, TinyStudent

from evatool.core.batch import Batch
from evatool.model.mim import build_mim
from evatool.objective.mim import MimObjective, masked_feature_loss
from evatool.weights.load import load_mim_weights


@pytest.fixture
def objective() -> MimObjective:
    torch.manual_seed(0)
    return MimObjective(TinyStudent(), TinyPatchTeacher())


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 4, 4), generator=generator, dtype=torch.uint8)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)  # ragged, as block masks are
    return Batch(image=image, keys=["a", "b", "c"], mask=mask)


def test_loss_is_the_negative_mean_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    expected = 0.0
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(p, t, strict=True))
        expected -= dot / math.sqrt(sum(a * a for a in p) * sum(b * b for b in t)) / 5
    assert float(masked_feature_loss(prediction, target)) == pytest.approx(expected, abs=1e-14)


def test_loss_ignores_scale_and_reaches_minus_one() -> None:
    target = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(masked_feature_loss(1e-3 * target, target)) == pytest.approx(-1.0, abs=1e-6)
    assert float(masked_feature_loss(-40 * target, target)) == pytest.approx(1.0, abs=1e-6)


def test_gradient_goes_to_the_prediction_only() -> None:
    prediction, target = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    target.requires_grad_()
    masked_feature_loss(prediction, target).backward()
    assert prediction.grad is not None
    assert target.grad is None
    assert torch.autograd.gradcheck(lambda p: masked_feature_loss(p, target.detach()), (prediction,))


def test_loss_is_float32_from_half_inputs_also_under_autocast() -> None:
    target = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    prediction = target.flip(0)
    expected = masked_feature_loss(prediction.bfloat16().float(), target.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_feature_loss(prediction.bfloat16(), target.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("shapes", "message"), [(((0, 7), (0, 7)), "no patch"), (((2, 7), (2, 8)), "differ in shape")])
def test_what_cannot_be_compared_is_refused(shapes: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_feature_loss(*(torch.zeros(shape) for shape in shapes))


def test_every_masked_patch_weighs_the_same(objective: MimObjective, batch: Batch) -> None:
    losses = objective(batch)
    prediction, target = objective.predict(batch)
    cosines = torch.cosine_similarity(prediction, target, dim=-1)
    assert len(cosines) == 6
    assert float(losses["loss"].detach()) == pytest.approx(-float(cosines.detach().sum()) / 6, abs=1e-6)
    assert float(losses["mask_ratio"]) == 0.5


def test_student_never_sees_masked_pixels_but_the_teacher_does(objective: MimObjective, batch: Batch) -> None:
    hidden = batch.mask.view(3, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(3, 3, 4, 4)
    changed = Batch(**{**vars(batch), "image": torch.where(hidden, 255 - batch.image, batch.image)})
    before, after = objective.predict(batch), objective.predict(changed)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert not torch.equal(after[1], before[1])


def test_teacher_sees_its_own_view_where_there_is_one(objective: MimObjective, batch: Batch) -> None:
    other = 255 - batch.image
    objective(Batch(**{**vars(batch), "teacher_image": other}))
    assert torch.equal(objective.teacher.seen[-1], other)


def test_teacher_is_frozen_and_no_part_of_the_module(objective: MimObjective, batch: Batch) -> None:
    objective(batch)["loss"].backward()
    assert all(p.grad is None for p in objective.teacher.head.parameters())
    assert all(name.startswith("model.") for name in objective.state_dict())
    assert all(p.grad is not None for p in objective.parameters())


class GoldenTeacher:
    """Hands out the stored features."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def visual_tokens(self, image: torch.Tensor) -> torch.Tensor:
        return self.features


@pytest.mark.parity
@pytest.mark.parametrize("name", MIM_FILES)
def test_objective_is_the_released_one(name: str) -> None:
    """Loss and gradients of the original EVA code, through the whole objective."""
    golden = read_golden(name)
    model = build_mim(golden.config, predict_dim=golden.config.predict_dim, patch_embed_grad_scale=1.0).train()
    load_mim_weights(model, golden.state)
    image, mask = golden.inputs["image"], golden.inputs["mask"]
    objective = MimObjective(model, GoldenTeacher(golden.inputs["teacher_features"]))
    loss = objective(Batch(image=image, keys=[""] * len(image), mask=mask))["loss"]
    loss.backward()
    assert relative(loss, golden.expected["loss"]) <= TOLERANCE
    assert relative(model.mask_token.grad, golden.expected["grad.mask_token"]) <= TOLERANCE
    assert relative(model.lm_head.weight.grad, golden.expected["grad.lm_head.weight"]) <= TOLERANCE
