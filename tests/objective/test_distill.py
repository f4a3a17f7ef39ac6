from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_clip import TinyTeacher, make_batch, tiny_clip
from tiny_distill import EVERYTHING, section_of, teachers_of, tiny_distillation
from torch import Tensor

from evatool.core.batch import Batch
from evatool.core.step import StepContext
from evatool.model.features import l2_normalize
from evatool.model.text import fit_tokens
from evatool.objective.build import build_objective
from evatool.objective.clip import ClipObjective
from evatool.objective.terms.feature import feature_loss
from evatool.objective.tiled.divergence import softmax_divergence
from evatool.recipe import schema
from evatool.teachers.base import Teacher, teacher_features


@pytest.fixture
def objective() -> Callable[..., ClipObjective]:
    def make(teacher_width: int = 8, teacher_scale: float | None = None, **section: object) -> ClipObjective:
        clip = TinyTeacher(tiny_clip(seed=1, width=teacher_width, context_length=9), context_length=9)
        return build_objective(
            schema.DistillObjective(**section),
            tiny_clip(),
            teachers=[Teacher(clip, teacher_width, scale=teacher_scale)],
            context_length=12,
            embed_dim=8,
        )

    return make


def features(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    image, text = torch.randn(2, 6, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return l2_normalize(image), l2_normalize(text)


@pytest.mark.parity
def test_logit_loss_is_open_clips_less_the_teachers_entropy() -> None:
    from open_clip.loss import DistillClipLoss

    (image, text), teacher = features(8), features(8, seed=1)
    image.requires_grad_()
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    logits = 30.0 * teacher[0] @ teacher[1].T
    entropy = sum(-(t.softmax(1) * t.log_softmax(1)).sum(1).mean() for t in (logits, logits.T)) / 2
    ours = softmax_divergence((image, text), scale, teacher, 30.0)
    _, theirs = DistillClipLoss()(image, text, scale, *teacher, 30.0)
    torch.testing.assert_close(ours, theirs - entropy, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(loss, (image, scale)) for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parity
def test_all_parts_are_clip_kds_with_its_weights() -> None:
    """As its loss.py adds them up: task + 2000 FD + CRD + ICL, where ICL's factor is the student's temperature."""
    import torch.nn.functional as F

    section = schema.DistillObjective(feature_loss="mse", feature_weight=2000.0, interactive_weight=1.0)
    student, batch = tiny_clip().double(), make_batch(6)
    clip = TinyTeacher(tiny_clip(seed=1, width=6).double(), context_length=12)
    torch.manual_seed(5)
    module = build_objective(section, student, teachers=[Teacher(clip, 6)], context_length=12, embed_dim=8).double()
    losses = module(batch)

    image, text = (l2_normalize(x) for x in (student.encode_image(pixels(batch)), student.encode_text(batch.tokens)))
    t_image, t_text = teacher_features(Teacher(clip, 6), batch)
    scale, right = student.logit_scale.exp().squeeze(), torch.arange(6)
    logits, t_logits = scale * image @ text.T, clip.logit_scale * t_image @ t_text.T
    wide_image, wide_text = l2_normalize(module.image_projection(image)), l2_normalize(module.text_projection(text))
    kl = [
        F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
        for s, t in ((logits, t_logits), (logits.T, t_logits.T))
    ]
    crossed = [scale * wide_image @ t_text.T, scale * wide_text @ t_image.T]
    expected = {
        "contrastive_loss": (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2,
        "feature_loss": F.mse_loss(wide_image, t_image) + F.mse_loss(wide_text, t_text),
        "logit_loss": (kl[0] + kl[1]) / 2,
        "interactive_loss": sum(F.cross_entropy(x, right) for x in crossed) / 2,
    }
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value.detach()), rel=1e-12), name
    whole = expected["contrastive_loss"] + 2000 * expected["feature_loss"] + expected["logit_loss"]
    whole = whole + expected["interactive_loss"]
    params = list(module.parameters())
    grads = [torch.autograd.grad(loss, params) for loss in (losses["loss"], whole)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def pixels(batch: Batch) -> Tensor:
    from evatool.core.image_norm import normalize_images

    return normalize_images(batch.image, dtype=torch.float64)


def test_feature_loss_averages_both_towers() -> None:
    x, y = torch.eye(3, dtype=torch.float64)[:2]
    same, across = x.expand(4, 3), y.expand(4, 3)
    assert float(feature_loss((same, same), (same, same))) == 0.0
    assert float(feature_loss((same, same), (same, across))) == 0.5
    assert float(feature_loss((same, same), (across, -same))) == 1.5
    pairs = features(6), features(6, seed=1)
    assert float(feature_loss(*pairs, "mse")) == pytest.approx(4 / 6 * float(feature_loss(*pairs)))


WEIGHTED = {
    "all": {},
    "no contrastive": {"contrastive_weight": 0.0, "logit_weight": 3.0},
    "no feature": {"feature_weight": 0.0},
    "no logit": {"logit_weight": 0.0},
    "everything": EVERYTHING,
    "relation alone": {"feature_weight": 0.0, "logit_weight": 0.0, "relation_weight": 1.0},
}


@pytest.mark.parametrize("section", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_loss_is_the_weighted_sum_of_what_is_logged(section: dict[str, object], objective) -> None:
    module, weights = objective(**section), schema.DistillObjective(**section).weights
    losses = module(make_batch(6))
    logged = [name for name in weights if name in losses]
    expected = sum(weights[name] * losses[name] for name in logged)
    assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)
    used = {name for name, weight in weights.items() if weight > 0}
    assert set(logged) == used | {"contrastive_loss"}
    losses["loss"].backward()
    assert all(p.grad is not None for p in module.parameters()), "an unused parameter stops multi-rank engines"


def test_each_of_several_teachers_counts_with_its_weight() -> None:
    kind = "distill, all parts, two teachers"
    module, batch = tiny_distillation(kind), make_batch(8, num_captions=5)
    losses = module(batch)
    expected = losses["contrastive_loss"]
    for name, weight in section_of(kind).weights.items():
        if name != "contrastive_loss":
            expected = expected + weight * (0.5 * losses[f"{name}/small"] + losses[f"{name}/large"])
    assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-12)
    assert {n for n, _ in module.named_parameters() if not n.startswith("model.")} == {
        "small_image_projection.weight",
        "small_text_projection.weight",
    }


def test_a_teachers_own_temperature_can_be_replaced(objective) -> None:
    batch, found = make_batch(6), {}
    for scale in (None, 50.0, 5.0):
        module = objective(teacher_scale=scale)
        found[scale] = float(module(batch)["logit_loss"])
    assert found[None] == found[50.0] != found[5.0]


def test_weights_follow_the_run(objective) -> None:
    module = objective(feature_weight=((0, 4.0), (100, 2.0), (200, 0.0)), logit_weight=((50, 0.0), (51, 1.0)))
    seen = {}
    for samples_seen in (0, 50, 51, 100, 150, 200, 10**9):
        step = StepContext(samples_seen=samples_seen)
        weights = module.weights(step)
        seen[samples_seen] = weights["feature_loss"], weights["logit_loss"]
        assert module.changing_weights(step) == {name: weights[name] for name in ("feature_loss", "logit_loss")}
        losses = module(make_batch(6), step)
        expected = sum(weights[name] * losses[name] for name in ("contrastive_loss", "feature_loss", "logit_loss"))
        assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)
    assert seen == {0: (4, 0), 50: (3, 0), 51: (2.98, 1), 100: (2, 1), 150: (1, 1), 200: (0, 1), 10**9: (0, 1)}
    losses["loss"].backward()
    assert all(p.grad is not None for p in module.parameters()), "also where a weight has come down to 0"


def test_sigmoid_starts_from_the_recipes_scale_and_bias(objective) -> None:
    module = objective(loss="sigmoid", logit_weight=0.0, initial_scale=20.0, initial_bias=-7.0)
    losses = module(make_batch(6))
    assert float(losses["logit_scale"]) == pytest.approx(20.0)
    assert float(losses["logit_bias"]) == -7.0
    default = objective(loss="sigmoid", logit_weight=0.0)(make_batch(6))
    assert (float(default["logit_scale"]), float(default["logit_bias"])) == (pytest.approx(10.0), -10.0)


def test_teacher_is_frozen_and_no_part_of_the_module(objective) -> None:
    module = objective(teacher_width=12)
    assert not any("teacher" in name for name in module.state_dict())
    module.train()
    module(make_batch(6))["loss"].backward()
    assert not teachers_of(module)[0].clip.model.training
    assert all(p.grad is None for p in teachers_of(module)[0].clip.model.parameters())


def test_projections_exist_only_where_widths_differ(objective) -> None:
    def extra(module: ClipObjective) -> dict[str, tuple[int, ...]]:
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
    teacher_features(teachers_of(module)[0], batch)
    teacher_features(teachers_of(module)[0], other)
    assert torch.equal(teachers_of(module)[0].clip.seen[0], batch.image)
    assert torch.equal(teachers_of(module)[0].clip.seen[1], other.teacher_image)


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it() -> None:
    student = tiny_clip(seed=3)
    teacher = Teacher(TinyTeacher(tiny_clip(seed=3), context_length=12, logit_scale=1 / 0.07), 8)
    section = schema.DistillObjective(relation_weight=1.0)
    objective = build_objective(section, student, teachers=[teacher], context_length=12, embed_dim=8)
    losses = objective(make_batch(6, context_length=40))  # captions at a longer context than either's
    assert float(losses["feature_loss"]) == pytest.approx(0.0, abs=1e-6)
    assert float(losses["logit_loss"]) == pytest.approx(0.0, abs=1e-5)
    assert float(losses["relation_loss"]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("context_length", [5, 8, 20, 77])
def test_fitted_tokens_are_the_tokenizers(context_length: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    captions = ["a cat", "a very large drawing of a smiling red cat under the moon", "!", "one two three four five six"]
    long = SimpleTokenizer(context_length=40)(captions)
    expected = SimpleTokenizer(context_length=context_length)(captions)
    assert torch.equal(fit_tokens(long, context_length), expected)
