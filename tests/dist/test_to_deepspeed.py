"""A checkpoint of ours, exported, is what DeepSpeed itself loads: weights, moments and step, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_run import ToyClip, ToyLoader, ToyObjective, toy_engine, toy_groups

from evatool.checkpoint.save import save_run
from evatool.distributed.collectives import rank, world_size
from evatool.distributed.world import World
from evatool.distributed.engines.deepspeed import _deepspeed, zero_config
from evatool.core.errors import RecipeError, UsageError
from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.runs.run_dir import RunOptions
from evatool.train.state import describe_groups

pytestmark = pytest.mark.dist
NUM_STEPS = 3


def save_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups)
    batches = iter(ToyLoader())
    for _ in range(NUM_STEPS):
        engine.set_lrs([group.lr for group in groups])
        engine.backward(engine.forward(next(batches))["loss"])
        engine.step()
    return save_run(
        folder,
        NUM_STEPS,
        objective_state=engine.sharded_model_state(),
        optimizer_state=engine.sharded_optimizer_state(),
        groups=describe_groups(groups),
        train_state={"step": NUM_STEPS, "samples_seen": 8 * NUM_STEPS},
        model_config={},
        resolved_toml="",
        keep=1,
    )


def load_in_deepspeed(folder: Path, stages: list[int]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What DeepSpeed says of every parameter of a model with other weights, once it has loaded the folder."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    answers = []
    for stage in stages:
        torch.manual_seed(7)
        model = ToyClip(0.0)
        named = dict(model.named_parameters())
        # Other groups than ours: the temperature with the matrices, the text tower with the visual one.
        settings = [
            {"params": [p for p in named.values() if (p.ndim > 1 or len(p) == 1) == is_decayed], "weight_decay": decay}
            for is_decayed, decay in ((True, 0.25), (False, 0.0))
        ]
        config = zero_config(stage, 1.0, torch.device("cpu")) | {"checkpoint": {"load_universal": True}}
        with _deepspeed(World(rank(), world_size(), rank(), torch.device("cpu"))) as deepspeed:
            engine, zero, _, _ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(settings, lr=0.5), config=config
            )
            path, client = engine.load_checkpoint(str(folder))
        assert path is not None
        found = {
            name: {
                "weight": safe_get_full_fp32_param(param),
                **{key: safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")},
            }
            for name, param in named.items()
        }
        inner = zero.optimizer
        steps = {float(state["step"]) for state in inner.state.values() if "step" in state}
        decays = [group["weight_decay"] for group in inner.param_groups]
        answers.append(
            found
            | {"": {"steps": steps, "global_steps": engine.global_steps, "decays": decays, "groups": client["groups"]}}
        )
    return answers


def test_deepspeed_loads_the_export(run_on_ranks, tmp_path):
    saved = save_checkpoint(tmp_path / "checkpoints")
    table = {"export": {"checkpoint": str(tmp_path), "format": "deepspeed"}}
    result = run_stage(resolve_table(table, "export"), RunOptions(name="x", run_dir=tmp_path / "out"))
    assert result.metrics["step"] == NUM_STEPS
    from evatool.checkpoint.load import load_checkpoint

    ours = load_checkpoint(saved)
    for answers in run_on_ranks(load_in_deepspeed, 2, tmp_path / "out", [1, 2, 3]):
        for stage, found in zip((1, 2, 3), answers, strict=True):
            facts = found.pop("")
            assert facts["steps"] == {float(NUM_STEPS)}
            assert facts["global_steps"] == NUM_STEPS
            assert facts["decays"] == [0.25, 0.0], "its own"
            assert [group["name"] for group in facts["groups"]] == [group["name"] for group in ours.groups]
            assert len(found) == sum(len(group["parameters"]) for group in ours.groups)
            for name, states in found.items():
                assert torch.equal(states["weight"], ours.objective_state[f"model.{name}"]), (stage, name)
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(states[moment], ours.optimizer_state[f"{moment}.model.{name}"]), (stage, name)
    module = torch.load(tmp_path / "out" / saved.name / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert set(module) == {"visual.scale"}, "what is not trained"


def test_only_training_checkpoints_as_they_are(tmp_path):
    with pytest.raises(RecipeError, match="dtype: format = 'deepspeed' writes a training checkpoint as it is"):
        resolve_table({"export": {"checkpoint": "x", "format": "deepspeed", "dtype": "fp16"}}, "export")
    (tmp_path / "model.safetensors").write_bytes(b"")
    table = {"export": {"checkpoint": str(tmp_path / "model.safetensors"), "format": "deepspeed"}}
    with pytest.raises(UsageError, match="no training checkpoint"):
        run_stage(resolve_table(table, "export"), RunOptions(name="x", run_dir=tmp_path / "out"))
