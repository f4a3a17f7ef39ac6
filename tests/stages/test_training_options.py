"""What a training recipe can ask for beside the training itself, through whole stages at debug size."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import evatool
from evatool.core.errors import DependencyError, RecipeError
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.optim.locking import lock
from evatool.recipe.load import resolve_table
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage
from evatool.stages.training import build as wiring
from evatool.train.hooks.base import Hook
from evatool.train.hooks.log import read_metrics

BATCH, STEPS = 8, 6


def weights_of(result: Result, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(result.outputs["checkpoint"] / f"{name}.safetensors")


# ---------------------------------------------------------------------------------------------------- moving average


class Snapshots(Hook):
    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def _take(self, trainer) -> None:
        state = trainer.engine.model_state()
        self.weights.append({n.removeprefix("model."): t.clone() for n, t in state.items() if n.startswith("model.")})

    def at_start(self, trainer) -> None:
        self._take(trainer)

    def after_step(self, result, trainer) -> None:
        self._take(trainer)


def test_the_moving_average_is_saved_resumed_and_loaded(run_training, tmp_path, monkeypatch) -> None:
    from evatool.stages.training import loop as training_loop

    snapshots = Snapshots()
    build = training_loop.build_hooks
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "build_hooks", lambda *a, **kw: [*build(*a, **kw), snapshots])
        whole = run_training("train-clip", tmp_path / "whole", "train.ema_decay=0.5")
    expected = snapshots.weights[0]
    for step, weights in enumerate(snapshots.weights[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
    averaged = weights_of(whole, "ema")
    assert averaged.keys() == weights_of(whole).keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=name)

    class Stop(Hook):
        def after_step(self, result, trainer) -> None:
            if result.step == 3:
                raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "build_hooks", lambda *a, **kw: [*build(*a, **kw), Stop()])
        with pytest.raises(RuntimeError, match="crash"):
            run_training("train-clip", tmp_path / "parts", "train.ema_decay=0.5", "checkpoint.every_steps=2")
    resumed = run_training(
        "train-clip", tmp_path / "parts", "train.ema_decay=0.5", "checkpoint.every_steps=2", resume=True
    )
    for name, tensor in averaged.items():
        assert torch.equal(weights_of(resumed, "ema")[name], tensor), name
    loaded = evatool.load_clip(whole.outputs["checkpoint"] / "ema.safetensors").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in averaged.items())
    assert evatool.load_clip(whole.run_dir).config.name == "EVA02-CLIP-debug"
    table = {"export": {"checkpoint": str(whole.outputs["checkpoint"] / "ema.safetensors")}}
    exported = run_stage(resolve_table(table, "export"), RunOptions(name="export", run_dir=tmp_path / "export"))
    again = evatool.load_clip(exported.run_dir).model.state_dict()
    assert all(torch.equal(again[name].reshape(-1), tensor.reshape(-1)) for name, tensor in averaged.items())


# ------------------------------------------------------------------------------------------------- figures and pictures


def test_evaluation_while_training_is_that_of_the_finished_model(run_training, drawings, tmp_path) -> None:
    asked = ["evaluate.every_steps=3", f"evaluate.data={drawings / 'eval'}", 'evaluate.sets=["held-out-concepts"]']
    names = sorted(path.name for path in (drawings / "eval").iterdir())
    asked[-1] = f"evaluate.sets={json.dumps(names[:2])}"
    result = run_training("train-clip", tmp_path / "run", *asked)
    records = {record["step"]: record for record in read_metrics(result.outputs["metrics"])}
    keys = {key for key in records[3] if key.startswith("eval/")}
    assert keys
    assert keys == {key for key in records[6] if key.startswith("eval/")}
    assert not any(key.startswith("eval/") for key in records[4])
    plain = run_training("train-clip", tmp_path / "plain")
    for name, tensor in weights_of(plain).items():
        assert torch.equal(weights_of(result)[name], tensor), "looking changes nothing"


def test_evaluations_between_log_lines_are_refused(run_training, tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"every_steps = 3 is no multiple of train.log_every = 2.*are: 2, 4"):
        run_training("train-clip", tmp_path / "run", "evaluate.every_steps=3", "evaluate.data=x", "train.log_every=2")


def test_norms_of_the_towers_add_up_and_mfu_is_told(clip_run) -> None:
    for record in read_metrics(clip_run.outputs["metrics"]):
        towers = [record[f"optim/grad_norm/{tower}"] for tower in ("visual", "text", "other")]
        assert sum(norm**2 for norm in towers) == pytest.approx(record["optim/grad_norm"] ** 2, rel=1e-4)
        assert min(towers) > 0
        assert 0 < record["throughput/mfu"] < 1
        assert record["throughput/eta_sec"] >= 0
    table = (clip_run.run_dir / "parameter_groups.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["group", "lr", "lr factor", "weight decay", "tensors", "parameters"]
    assert [row.split("\t")[0] for row in table[1:]] == [
        f"{tower}/{kind}"
        for tower, kinds in (
            ("visual", ("decay", "no_decay")),
            ("text", ("decay", "no_decay")),
            ("other", ("no_decay",)),
        )
        for kind in kinds
    ]


def test_status_follows_the_run(run_training, tmp_path, monkeypatch) -> None:
    from evatool.stages.training import loop as training_loop

    class Look(Hook):
        def after_step(self, result, trainer) -> None:
            if result.step == 1:
                seen.append(json.loads((tmp_path / "run" / "status.json").read_text()))

    seen: list[dict] = []
    build = training_loop.build_hooks
    monkeypatch.setattr(training_loop, "build_hooks", lambda *a, **kw: [*build(*a, **kw), Look()])
    run_training("train-clip", tmp_path / "run")
    assert (seen[0]["state"], seen[0]["step"]) == ("running", 1)


# ---------------------------------------------------------------------------------------------------------- trackers


class FakeTracker(types.ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_records_reach_the_tracker(kind, run_training, tmp_path, monkeypatch) -> None:
    fake = FakeTracker(kind)
    monkeypatch.setitem(sys.modules, kind, fake)
    result = run_training("train-clip", tmp_path / "run", f'train.trackers=["{kind}"]')
    assert [step for step, _ in fake.logged] == list(range(1, STEPS + 1))
    assert fake.logged[-1][1]["train/loss"] == result.metrics["train/loss"]
    assert (len(fake.started), fake.finished) == (1, 1)
    assert fake.started[0]["config"]["train.global_batch_size"] == str(BATCH)


def test_tensorboard_holds_every_record(run_training, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_training("train-clip", tmp_path / "run", 'train.trackers=["tensorboard"]')
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert points[-1].value == pytest.approx(result.metrics["train/loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named_with_its_extra(kind, run_training, tmp_path, monkeypatch) -> None:
    from evatool.train.hooks.trackers import MODULES

    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    with pytest.raises(DependencyError, match=f"train.trackers names {kind}") as raised:
        run_training("train-clip", tmp_path / "run", f'train.trackers=["{kind}"]')
    assert "evatool[track]" in str(raised.value.fix)


# ------------------------------------------------------------------------------------------- locking and patch dropout


def frozen_names(preset: str, tower: str, layers) -> tuple[set[str], set[str]]:
    config = resolve_preset(preset)
    with torch.device("meta"):
        clip = build_clip(config)
    depth = {"visual": config.depth, "text": config.text_depth}[tower]
    lock([(f"model.{name}", param) for name, param in clip.named_parameters()], tower, layers, depth)
    names = {name for name, param in clip.named_parameters() if not param.requires_grad}
    return names, {name for name, _ in clip.named_parameters()} - names


@pytest.mark.parametrize("preset", ["EVA02-CLIP-debug", "EVA02-CLIP-L-14", "EVA-CLIP-8B", "OpenAI-CLIP-B-16"])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_the_projection_learns_when_a_tower_is_locked(preset, tower) -> None:
    frozen, learning = frozen_names(preset, tower, "all")
    assert all(name.startswith(f"{tower}.") for name in frozen)
    own = {name for name in learning if name.startswith(f"{tower}.")}
    projections = (
        {"text.text_projection"}
        if tower == "text"
        else {
            "visual.trunk.head.weight",
            "visual.trunk.head.bias",
            "visual.head.proj.weight",
            "visual.proj",
        }
    )
    assert own
    assert own <= projections, "nothing else learns"


def test_a_tower_is_locked_in_part_from_its_input() -> None:
    frozen, learning = frozen_names("EVA02-CLIP-debug", "visual", 1)
    assert {"visual.trunk.cls_token", "visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight"} <= frozen
    assert any("blocks.0." in name for name in frozen)
    assert not any("blocks.1." in name or name.rpartition("trunk.")[2] == "norm.weight" for name in frozen)
    assert any("blocks.1." in name for name in learning)
    assert not any("blocks." in name for name in frozen_names("EVA02-CLIP-debug", "visual", 0)[0])
    with pytest.raises(RecipeError, match="the visual tower has 2 blocks"):
        frozen_names("EVA02-CLIP-debug", "visual", 3)


def test_what_is_locked_stays_and_the_rest_moves(run_training, clip_run, tmp_path) -> None:
    init = [
        "model.init.kind=clip",
        f"model.init.path={clip_run.run_dir}",
        'model.lock.visual="all"',
        "model.lock.text=0",
    ]
    before, after = weights_of(clip_run), weights_of(run_training("train-clip", tmp_path / "run", *init))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith("visual.")} == {
        "visual.trunk.head.weight",
        "visual.trunk.head.bias",
    }
    assert "text.transformer.resblocks.0.mlp.c_fc.weight" in moved
    assert not moved & {"text.token_embedding.weight", "text.positional_embedding"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['model.lock.visual="all"'], "model.lock freezes random weights"),
        (
            ["model.init.kind=clip", "model.init.path=x", 'model.lock.visual="all"', "model.drop_path_rate=0.1"],
            "only disturbs a frozen tower",
        ),
        (["model.patch_dropout_schedule=[[64, 0.5], [32, 0.0]]"], "in rising order"),
        (["train.micro_batch_size=3"], "micro_batch_size = 3 does not divide"),
        (["checkpoint.keep_every_steps=10"], "keep_every_steps = 10 keeps nothing"),
        (["checkpoint.keep_every_steps=10", "checkpoint.every_steps=4"], "make it a multiple of every_steps"),
    ],
)
def test_settings_without_effect_are_refused(overrides, message) -> None:
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 64, "global_batch_size": 8},
    }
    with pytest.raises(RecipeError, match=message):
        resolve_table(table, "train-clip", overrides=overrides)


def test_a_micro_batch_must_divide_a_ranks_share() -> None:
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 64, "global_batch_size": 24, "micro_batch_size": 8},
    }
    recipe = resolve_table(table, "train-clip").recipe
    wiring.check_world_size(recipe, 1)
    with pytest.raises(RecipeError, match=r"24 / 2 = 12; nearest that do: 6, 12"):
        wiring.check_world_size(recipe, 2)


def test_patch_dropout_follows_its_schedule(run_training, tmp_path, monkeypatch) -> None:
    """Kept patches of 16: max(1, int((1 - share) 16)), as EVA keeps them; from the given sample on."""
    from evatool.stages.training import loop as training_loop

    class Count(Hook):
        def at_start(self, trainer) -> None:
            block = trainer.objective.model.visual.trunk.blocks[0]
            block.register_forward_hook(lambda m, args, out: seen.append(out.shape[1] - 1))

    build = training_loop.build_hooks
    monkeypatch.setattr(training_loop, "build_hooks", lambda *a, **kw: [*build(*a, **kw), Count()])
    seen: list[int] = []
    schedule = ["model.patch_dropout=0.5", "model.patch_dropout_schedule=[[16, 0.7], [32, 0.0]]"]
    run_training("train-clip", tmp_path / "run", *schedule)
    assert seen == [8, 8, 4, 4, 16, 16]
    seen.clear()
    run_training("train-clip", tmp_path / "raised", "model.patch_dropout_schedule=[[24, 0.5]]")
    assert seen == [16, 16, 16, 8, 8, 8]


def test_small_batches_train_as_the_whole(run_training, clip_run, tmp_path) -> None:
    result = run_training("train-clip", tmp_path / "run", "train.micro_batch_size=2")
    for record, whole in zip(*(read_metrics(r.outputs["metrics"]) for r in (result, clip_run)), strict=True):
        assert record["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-4)
    distilled = run_training("distill", tmp_path / "distilled", "train.micro_batch_size=4", teacher=clip_run.run_dir)
    assert distilled.metrics["steps"] == STEPS
