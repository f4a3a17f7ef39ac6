from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_clip import TinyTeacher, make_batch, tiny_clip
from torch import Tensor

from evatool.objective.contrastive import unit
from evatool.objective.distill import (
    DistillObjective,
    feature_loss,
    fit_tokens,
    logit_loss,
    pair_logits,
    teacher_features,
)
from evatool.recipe import schema
from evatool.types import Batch


@pytest.fixture
def objective() -> Callable[..., DistillObjective]:
    def make(teacher_width: int = 8, **section: float) -> DistillObjective:
        teacher = TinyTeacher(tiny_clip(seed=1, width=teacher_width, context_length=9), context_length=9)
        return DistillObjective(
            tiny_clip(),
            teacher,
            schema.DistillObjective(**section),
            context_length=12,
            student_width=8,
            teacher_width=teacher_width,
        )

    return make


def random_logits(seed: int) -> tuple[Tensor, Tensor]:
    rows = 5 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows, rows.T.contiguous()


@pytest.mark.parity
def test_logit_loss_is_open_clips_less_the_teachers_entropy() -> None:
    from open_clip.loss import DistillClipLoss

    raw = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image, text, teacher_image, teacher_text = unit(raw)
    image.requires_grad_()
    teacher = pair_logits(teacher_image, teacher_text, 30.0)
    entropy = sum(-(t.softmax(1) * t.log_softmax(1)).sum(1).mean() for t in teacher) / 2
    ours = logit_loss(pair_logits(image, text, 14.0), teacher)
    _, theirs = DistillClipLoss()(image, text, 14.0, teacher_image, teacher_text, 30.0)
    torch.testing.assert_close(ours, theirs - entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, image), torch.autograd.grad(theirs, image), rtol=1e-10, atol=1e-12
    )


def test_logit_loss_is_zero_only_at_the_teachers_distribution() -> None:
    logits = random_logits(0)
    shifted = (logits[0] + 3.0, logits[1] - 2.0)  # softmax ignores a shift
    assert float(logit_loss(shifted, logits)) == pytest.approx(0.0, abs=1e-12)
    assert float(logit_loss(random_logits(1), logits)) > 0.1


def test_feature_loss_averages_both_towers() -> None:
    x, y = torch.eye(3, dtype=torch.float64)[:2]
    same, across = x.expand(4, 3), y.expand(4, 3)
    assert float(feature_loss((same, same), (same, same))) == 0.0
    assert float(feature_loss((same, same), (same, across))) == 0.5
    assert float(feature_loss((same, same), (across, -same))) == 1.5


@pytest.mark.parametrize(
    "section",
    [{}, {"contrastive_weight": 0.0, "logit_weight": 3.0}, {"feature_weight": 0.0}, {"logit_weight": 0.0}],
    ids=["all", "no contrastive", "no feature", "no logit"],
)
def test_loss_is_the_weighted_sum_of_what_is_logged(section: dict[str, float], objective) -> None:
    module = objective(**section)
    losses = module(make_batch(6))
    names = {"contrastive_loss": "contrastive_weight", "feature_loss": "feature_weight", "logit_loss": "logit_weight"}
    logged = {name: weight for name, weight in names.items() if name in losses}
    expected = sum(getattr(module.section, weight) * losses[name] for name, weight in logged.items())
    assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)
    assert "contrastive_loss" in losses
    assert ("feature_loss" in losses, "logit_loss" in losses) == (
        module.section.feature_weight > 0,
        module.section.logit_weight > 0,
    )
    losses["loss"].backward()
    assert all(p.grad is not None for p in module.parameters()), "an unused parameter stops multi-rank engines"


def test_teacher_is_frozen_and_no_part_of_the_module(objective) -> None:
    module = objective(teacher_width=12)
    assert not any("teacher" in name for name in module.state_dict())
    module.train()
    module(make_batch(6))["loss"].backward()
    assert not module.teacher.model.training
    assert all(p.grad is None for p in module.teacher.model.parameters())


def test_projections_exist_only_where_widths_differ(objective) -> None:
    def extra(module: DistillObjective) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.startswith("model.")}

    assert extra(objective(teacher_width=8)) == {}
    assert extra(objective(teacher_width=12, feature_weight=0.0)) == {}
    assert extra(objective(teacher_width=12)) == {
        "image_projection.weight": (12, 8),
        "text_projection.weight": (12, 8),
    }


def test_teacher_sees_its_own_view_and_context(objective) -> None:
    module, batch = objective(), make_batch(6)
    other = Batch(**{**vars(batch), "teacher_image": 255 - batch.image})
    teacher_features(module.teacher, batch)
    teacher_features(module.teacher, other)
    assert torch.equal(module.teacher.seen[0], batch.image)
    assert torch.equal(module.teacher.seen[1], other.teacher_image)


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it() -> None:
    student = tiny_clip(seed=3)
    teacher = TinyTeacher(tiny_clip(seed=3), context_length=12, logit_scale=1 / 0.07)
    objective = DistillObjective(
        student, teacher, schema.DistillObjective(), context_length=12, student_width=8, teacher_width=8
    )
    losses = objective(make_batch(6, context_length=40))  # captions at a longer context than either's
    assert float(losses["feature_loss"]) == pytest.approx(0.0, abs=1e-6)
    assert float(losses["logit_loss"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("context_length", [5, 8, 20, 77])
def test_fitted_tokens_are_the_tokenizers(context_length: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    captions = ["a cat", "a very large drawing of a smiling red cat under the moon", "!", "one two three four five six"]
    long = SimpleTokenizer(context_length=40)(captions)
    expected = SimpleTokenizer(context_length=context_length)(captions)
    assert torch.equal(fit_tokens(long, context_length), expected)
