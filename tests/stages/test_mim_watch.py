"""Pictures and validation of a MIM run: what they show, and that they change nothing of what is learned."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from evatool.core.errors import RecipeError
from evatool.core.image_norm import normalize_images
from evatool.data.train.loader import build_train_loader
from evatool.data.train.masking import MaskSpec
from evatool.model.config import ModelConfig
from evatool.model.mim import build_mim
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import AugmentSection, TrainDataSection
from evatool.stages.training import teachers
from evatool.stages.training.mim_hooks import fixed_mask
from evatool.stages.training.mim_images import CELL, GAP, HIDDEN_COLOR, LABEL_WIDTH, feature_colors
from evatool.train.hooks.log import read_metrics
from evatool.weights.load import load_mim_weights

pytestmark = pytest.mark.e2e


def losses_of(result) -> list[float]:
    return [r["train/loss"] for r in read_metrics(result.outputs["metrics"])]


@pytest.fixture(scope="module")
def watched(run_training, drawings, clip_run, tmp_path_factory):
    """A run with both, and one without; with drop path, whose random numbers watching must leave alone."""
    folder = tmp_path_factory.mktemp("watched")
    held_out = drawings / "train"  # what is held out does not matter here
    watching = [f"validation.data={held_out}", "validation.every_steps=2", "images.every_steps=3"]
    plain = run_training("pretrain-mim", folder / "plain", "model.drop_path_rate=0.2", teacher=clip_run.run_dir)
    settings = [*watching, "model.drop_path_rate=0.2"]
    return plain, run_training("pretrain-mim", folder / "run", *settings, teacher=clip_run.run_dir)


def test_watching_changes_nothing(watched) -> None:
    plain, run = watched
    assert losses_of(run) == losses_of(plain)


def test_validation_is_the_loss_on_held_out_pictures(watched, drawings, clip_run) -> None:
    """Against the same sum written out: every picture of the set once, whole, under the fixed mask."""
    _, run = watched
    found = {r["step"]: r.get("val/loss") for r in read_metrics(run.outputs["metrics"])}
    assert [step for step, loss in found.items() if loss is not None] == [2, 4, 6]
    assert run.metrics["val/loss"] == found[6]
    checkpoint = run.outputs["checkpoint"]
    config = ModelConfig.from_json(json.loads((checkpoint / "model_config.json").read_text()))
    student = build_mim(config, predict_dim=32).eval()
    load_mim_weights(student, load_file(checkpoint / "model.safetensors"))
    teacher = teachers.load_clip(clip_run.run_dir)
    section = TrainDataSection(train=drawings / "train", augment=AugmentSection(crop_scale=(1, 1), crop_ratio=(1, 1)))
    options = {"image_size": 32, "context_length": 0, "global_batch_size": 1, "rank": 0, "world_size": 1, "seed": 1}
    mask = torch.from_numpy(fixed_mask((4, 4), "blocks"))[None]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in build_train_loader(section, with_text=False, one_pass=True, **options):
            prediction = student(normalize_images(batch.image), mask)
            total += float(F.cosine_similarity(prediction, teacher.visual_tokens(batch.image)[mask], dim=-1).mean())
            count += 1
    assert found[6] == pytest.approx(-total / count, abs=1e-5)


def test_validation_does_not_run_the_teacher_twice(run_training, drawings, clip_run, tmp_path) -> None:
    settings = [
        f"validation.data={drawings / 'train'}",
        "validation.every_steps=3",
        "validation.max_samples=20",
        f"teacher.store.path={tmp_path / 'rows'}",
        "teacher.store.masked_only=true",
    ]
    first = run_training("pretrain-mim", tmp_path / "first", *settings, teacher=clip_run.run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_clip", None)
        again = run_training("pretrain-mim", tmp_path / "again", *settings, teacher=clip_run.run_dir)
    assert again.metrics["val/loss"] == first.metrics["val/loss"]
    sheet = np.asarray(Image.open(again.outputs["mim_pictures"]))
    teacher_row = sheet[4 * (CELL + GAP) : 4 * (CELL + GAP) + CELL, LABEL_WIDTH : LABEL_WIDTH + CELL].reshape(-1, 3)
    grey = (teacher_row == np.array(HIDDEN_COLOR)).all(axis=1).mean()
    assert 0.3 < grey < 1  # features of visible patches were not kept


def test_sheets_and_their_page(watched) -> None:
    _, run = watched
    folder = run.run_dir / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "step_00000003.png", "step_00000006.png"]
    page = (folder / "index.html").read_text()
    assert re.findall(r"src='(step_\d+\.png)'", page) == ["step_00000006.png", "step_00000003.png"]
    assert (folder / "step_00000006.png").read_bytes() == run.outputs["mim_pictures"].read_bytes()


def test_fixed_masks() -> None:
    assert fixed_mask((4, 4), "blocks").reshape(4, 4).astype(int).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]] * 2
    assert fixed_mask((4, 4), "random").reshape(4, 4).astype(int).tolist() == [[0, 1, 0, 1], [1, 1, 1, 1]] * 2
    assert fixed_mask((16, 16), "random").sum() == MaskSpec((16, 16), 0.75, 0.1, "random").generator().num_masked


def test_colors_are_of_like_features() -> None:
    """A student that predicts the teacher's features up to their length has its colours; a turned one has not."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 9, 8, generator=generator)
    known = torch.ones(2, 9, dtype=torch.bool)
    same, theirs = feature_colors(3 * teacher, teacher, known)
    assert torch.allclose(same, theirs, atol=1e-6)
    assert theirs.shape == (2, 9, 3)
    assert float(theirs.std()) > 0.1
    other, _ = feature_colors(teacher.flip(1), teacher, known)
    assert torch.allclose(other, theirs.flip(1), atol=1e-6)
    known[0, 3] = False
    assert feature_colors(teacher, teacher, known)[1][0, 3].tolist() == pytest.approx([128 / 255] * 3)


def test_validations_between_two_records_are_refused() -> None:
    given = ["validation.data=x", "validation.every_steps=15", "train.log_every=10"]
    with pytest.raises(RecipeError, match=r"validation.every_steps = 15 is no multiple of train.log_every = 10"):
        load_recipe("demo/pretrain-mim", given)
