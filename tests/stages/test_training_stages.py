"""The training stages on real drawings at debug size, through `run_stage`."""

from __future__ import annotations

import json
import math
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evatool
from evatool.core.errors import CheckpointError, Preempted, RecipeError, UsageError
from evatool.recipe.load import load_recipe
from evatool.runs.result import Result
from evatool.stages.training import build as wiring
from evatool.stages.training import loop as training_loop
from evatool.train.hooks.base import Hook
from evatool.train.hooks.log import read_metrics

pytestmark = pytest.mark.e2e

BATCH, STEPS = 8, 6


def weights_of(result: Result, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(result.outputs["checkpoint"] / f"{name}.safetensors")


# ------------------------------------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize("fixture", ["clip_run", "mim_run"])
def test_a_run_leaves_what_it_says(fixture: str, request: pytest.FixtureRequest) -> None:
    result: Result = request.getfixturevalue(fixture)
    assert all(path.exists() for path in result.outputs.values())
    assert {"checkpoint", "metrics", "loss_curve"} <= set(result.outputs)
    assert result.metrics["steps"] == STEPS
    assert result.metrics["samples_seen"] == STEPS * BATCH
    assert math.isfinite(result.metrics["train/loss"])
    records = read_metrics(result.outputs["metrics"])
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["train/loss"] == result.metrics["train/loss"]
    status = json.loads((result.run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)


def test_clip_run_learns_and_can_be_loaded(clip_run: Result) -> None:
    records = read_metrics(clip_run.outputs["metrics"])
    assert {"train/i2t_top1", "train/t2i_top1", "train/logit_scale"} <= set(records[0])
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    clip = evatool.load_clip(clip_run.run_dir)
    saved = weights_of(clip_run)
    assert set(saved) == set(clip.model.state_dict())
    assert torch.equal(clip.model.logit_scale, saved["logit_scale"])
    assert clip_run.metrics["parameters"] == sum(p.numel() for p in clip.model.parameters())


def test_mim_run_learns_and_keeps_no_teacher(mim_run: Result) -> None:
    records = read_metrics(mim_run.outputs["metrics"])
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.1
    assert -1 <= records[-1]["train/loss"] <= 0
    names = set(weights_of(mim_run))
    assert {"mask_token", "lm_head.weight", "lm_head.bias"} <= names
    assert all(name.startswith("visual.") for name in names - {"mask_token", "lm_head.weight", "lm_head.bias"})
    assert not (mim_run.outputs["checkpoint"] / "extra.safetensors").exists()


def test_mim_pictures_show_what_was_hidden(mim_run: Result) -> None:
    sheet = Image.open(mim_run.outputs["mim_pictures"])
    colors = {color for _, color in sheet.convert("RGB").getcolors(maxcolors=sheet.width * sheet.height)}
    assert sheet.width > sheet.height
    assert (128, 128, 128) in colors


def test_next_commands_are_real(clip_run: Result, mim_run: Result) -> None:
    assert clip_run.next_command is not None
    words = shlex.split(clip_run.next_command)
    assert words[:3] == ["evatool", "eval", str(clip_run.run_dir)]
    assert Path(words[words.index("--data") + 1]).is_dir()
    assert mim_run.next_command is not None
    words = shlex.split(mim_run.next_command)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    recipe = load_recipe(words[2], overrides=overrides, stage=words[1]).recipe
    assert recipe.model.init.path == mim_run.run_dir


# ---------------------------------------------------------------------------------------------------------- resume


class StopAfter(Hook):
    """Asks the trainer to stop as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, result, trainer) -> None:
        if result.step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def stop_after_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    build = training_loop.build_hooks
    monkeypatch.setattr(training_loop, "build_hooks", lambda *args, **kw: [*build(*args, **kw), StopAfter(2)])
    return monkeypatch


OVERRIDES = {
    "train-clip": ["model.patch_dropout=0.5", "model.drop_path_rate=0.1", 'objective.positives="equal-captions"'],
    "pretrain-mim": ["model.drop_path_rate=0.1", "data.augment.horizontal_flip=0.5"],
    "distill": ["model.patch_dropout=0.5"],
}


@pytest.mark.parametrize("stage", OVERRIDES)
def test_resumed_equals_uninterrupted(stage, run_training, clip_run, tmp_path, stop_after_two) -> None:
    """Bit for bit on a CPU, with random regularisation on: weights, moments and every record of the loss."""
    teacher = None if stage == "train-clip" else clip_run.run_dir
    with pytest.raises(Preempted):
        run_training(stage, tmp_path / "stopped", *OVERRIDES[stage], teacher=teacher)
    status = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, 2)
    stop_after_two.undo()
    resumed = run_training(stage, tmp_path / "stopped", *OVERRIDES[stage], teacher=teacher, resume=True)
    whole = run_training(stage, tmp_path / "whole", *OVERRIDES[stage], teacher=teacher)
    for name in ("model", "optimizer"):
        ours, theirs = weights_of(resumed, name), weights_of(whole, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [[r["train/loss"] for r in read_metrics(result.outputs["metrics"])] for result in (resumed, whole)]
    assert losses[0] == losses[1]


def test_a_run_that_died_after_its_last_save_gives_its_result(run_training, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            training_loop, "training_result", lambda *args, **kw: (_ for _ in ()).throw(RuntimeError("power cut"))
        )
        with pytest.raises(RuntimeError, match="power cut"):
            run_training("train-clip", folder)
    result = run_training("train-clip", folder, resume=True)
    assert result.metrics["train/loss"] == read_metrics(folder / "metrics.jsonl")[-1]["train/loss"]
    assert result.outputs["checkpoint"].is_dir()


def test_a_resume_does_not_need_what_the_weights_came_from(run_training, mim_run, tmp_path, stop_after_two) -> None:
    source = tmp_path / "mim"
    source.symlink_to(mim_run.run_dir)
    init = ["model.init.kind=image-tower", f"model.init.path={source}"]
    with pytest.raises(Preempted):
        run_training("train-clip", tmp_path / "run", *init)
    stop_after_two.undo()
    source.unlink()
    assert run_training("train-clip", tmp_path / "run", *init, resume=True).metrics["steps"] == STEPS


# ------------------------------------------------------------------------------------------------------ first weights


def initial_weights(preset_section) -> dict[str, torch.Tensor]:
    config = wiring.clip_config(preset_section)
    torch.manual_seed(0)
    return wiring.build_clip_model(config, preset_section, is_resumed=False).state_dict()


def clip_section(**init: str):
    from evatool.recipe.schema import ClipModelSection

    return ClipModelSection.model_validate_json(
        json.dumps({"preset": "EVA02-CLIP-debug", "init": init or {"kind": "none"}})
    )


@pytest.mark.parametrize("fixture", ["mim_run", "clip_run"])
def test_image_tower_comes_from_mim_or_clip(fixture: str, request: pytest.FixtureRequest) -> None:
    source: Result = request.getfixturevalue(fixture)
    fresh, given = (
        initial_weights(clip_section()),
        initial_weights(clip_section(kind="image-tower", path=str(source.run_dir))),
    )
    saved = weights_of(source)
    prefix = "visual." if fixture == "mim_run" else "visual.trunk."
    block = "blocks.1.mlp.fc2.weight"
    assert torch.equal(given[f"visual.trunk.{block}"], saved[prefix + block])
    for name in ("text.token_embedding.weight", "visual.trunk.head.weight", "logit_scale"):
        assert torch.equal(given[name], fresh[name])


def test_whole_model_comes_from_clip(clip_run: Result) -> None:
    given, saved = initial_weights(clip_section(kind="clip", path=str(clip_run.run_dir))), weights_of(clip_run)
    assert all(torch.equal(given[name], saved[name]) for name in saved)


def test_a_mim_model_is_no_whole_clip(mim_run: Result) -> None:
    with pytest.raises(CheckpointError):
        initial_weights(clip_section(kind="clip", path=str(mim_run.run_dir)))


# ---------------------------------------------------------------------------------------------- students and teachers


def test_distill_against_a_wider_teacher_of_another_size(run_training, tmp_path) -> None:
    """48 pixels and 128 features against 32 and 32: its own view of the pictures, and projections that are kept."""
    result = run_training("distill", tmp_path / "run", teacher="EVA02-CLIP-toy-small")
    names = {"contrastive_loss", "feature_loss", "logit_loss"}
    record = read_metrics(result.outputs["metrics"])[-1]
    assert {f"train/{name}" for name in names} <= set(record)
    assert record["train/loss"] == pytest.approx(sum(record[f"train/{name}"] for name in names), rel=1e-5)
    assert {name: tuple(t.shape) for name, t in weights_of(result, "extra").items()} == {
        "image_projection.weight": (128, 32),
        "text_projection.weight": (128, 32),
    }
    assert set(weights_of(result)) == set(evatool.load_clip(result.run_dir).model.state_dict())


def test_mim_student_of_another_input_size_but_the_same_grid(run_training, tmp_path) -> None:
    """Both cut a picture into 4 x 4 patches: of 8 pixels in the student, of 12 in the teacher."""
    result = run_training("pretrain-mim", tmp_path / "run", teacher="EVA02-CLIP-toy")
    assert weights_of(result)["visual.patch_embed.proj.weight"].shape[-1] == 8
    assert weights_of(result)["lm_head.weight"].shape[0] == 128
    assert result.metrics["train/loss"] < 0


def test_the_teachers_grid_is_carried_to_the_students(run_training, tmp_path) -> None:
    """5 x 5 patches of 8 pixels in the student, 4 x 4 of 12 in the teacher."""
    result = run_training("pretrain-mim", tmp_path / "run", "model.image_size=40", teacher="EVA02-CLIP-toy")
    assert result.metrics["train/loss"] < 0


def test_widths_that_differ_are_refused_by_name(run_training, tmp_path) -> None:
    with pytest.raises(RecipeError, match="EVA-02-Ti predicts 1024 features a patch, the teacher EVA02-CLIP-toy gives"):
        run_training("pretrain-mim", tmp_path / "run", "model.preset=EVA-02-Ti", teacher="EVA02-CLIP-toy")


def test_a_teacher_that_is_nothing_is_refused(run_training, tmp_path) -> None:
    with pytest.raises(UsageError, match="no/such/model"):
        run_training("distill", tmp_path / "run", teacher="no/such/model")


def test_a_mim_preset_is_no_clip(run_training, tmp_path) -> None:
    with pytest.raises(RecipeError, match="no text tower"):
        run_training("train-clip", tmp_path / "run", 'model.preset="EVA-02-Ti"')


@pytest.mark.slow
def test_bf16_and_loader_processes_train_much_the_same(run_training, clip_run, tmp_path) -> None:
    result = run_training("train-clip", tmp_path / "run", 'train.precision="bf16"', "data.num_workers=1")
    assert result.metrics["train/loss"] == pytest.approx(clip_run.metrics["train/loss"], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(result).values())


def test_a_loss_at_the_log_of_the_batch_is_reported(run_training, clip_run, tmp_path) -> None:
    """With a learning rate of next to nothing the loss cannot leave its start; the result says so."""
    settings = ["optim.visual.lr=1e-12", "optim.text.lr=1e-12", "train.samples_seen=192"]
    result = run_training("train-clip", tmp_path / "run", *settings)
    assert result.metrics["stuck_at_start"] == 1
    assert "ln(batch) = 2.079" in result.metrics["warning"]
    assert clip_run.metrics["stuck_at_start"] == 0
    assert "warning" not in clip_run.metrics


def test_sigmoid_loss_lamb_and_cooldown_in_one_run_that_resumes(run_training, tmp_path, stop_after_two) -> None:
    chosen = [
        'objective.kind="sigmoid"',
        'objective.positives="equal-captions"',
        'optim.kind="lamb"',
        'schedule.kind="constant-cooldown"',
        "schedule.cooldown_samples=16",
    ]
    with pytest.raises(Preempted):
        run_training("train-clip", tmp_path / "stopped", *chosen)
    stop_after_two.undo()
    resumed = run_training("train-clip", tmp_path / "stopped", *chosen, resume=True)
    whole = run_training("train-clip", tmp_path / "whole", *chosen)
    records = read_metrics(whole.outputs["metrics"])
    assert [record["optim/lr/visual"] for record in records] == pytest.approx([1e-3] * 5 + [5e-4])
    assert records[0]["train/logit_scale"] == pytest.approx(10, rel=1e-5)
    assert records[0]["train/logit_bias"] == -10
    assert records[-1]["train/logit_bias"] != -10
    assert "stuck_at_start" not in whole.metrics, "its loss does not start at ln(batch)"
    assert weights_of(resumed).keys() == weights_of(whole).keys()
    for name, tensor in weights_of(resumed).items():
        assert torch.equal(tensor, weights_of(whole)[name]), name
    assert load_file(whole.outputs["checkpoint"] / "extra.safetensors").keys() == {"logit_bias"}
    trained = evatool.load_clip(whole.run_dir)
    assert trained.logit_scale == pytest.approx(records[-1]["train/logit_scale"], rel=1e-2)
    assert trained.logit_bias == pytest.approx(records[-1]["train/logit_bias"], abs=0.05)
    assert trained.logit_bias != -10


def test_a_fixed_temperature_stays(run_training, tmp_path) -> None:
    result = run_training("train-clip", tmp_path / "run", 'objective.temperature.kind="fixed"')
    scales = [record["train/logit_scale"] for record in read_metrics(result.outputs["metrics"])]
    assert scales == pytest.approx([100] * len(scales), rel=1e-5)
    assert evatool.load_clip(result.run_dir).logit_scale == pytest.approx(100, rel=1e-5)
