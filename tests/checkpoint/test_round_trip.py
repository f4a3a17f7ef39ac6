"""What is saved is what is loaded, in a format that safetensors reads."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from evatool.checkpoint import layout
from evatool.checkpoint.load import latest_checkpoint, load_checkpoint, read_model, verify
from evatool.core.errors import CheckpointError
from evatool.distributed.engines.sharded_state import ShardedState

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_safetensors_reads_every_dtype_and_shape(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": (torch.randn(3, i) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["transposed"] = torch.randn(4, 5).T
    path, held = tmp_path / "t.safetensors", ShardedState.whole(tensors)
    layout.create_tensor_file(path, held)
    entry = layout.write_ranges(path, held, is_first=True)
    assert entry == {"ranges": [[0, path.stat().st_size]], "sha256": layout.sha256_of(path)}
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_folder_has_the_stated_files(save, tmp_path):
    path = save(1000)
    assert path == tmp_path / "checkpoints" / "step_00001000"
    names = {"model", "extra", "optimizer"}
    documents = {"groups.json", "train_state.json", "model_config.json", "resolved.toml", "MANIFEST.json"}
    assert {p.name for p in path.iterdir()} == {f"{name}.safetensors" for name in names} | documents
    with safe_open(path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["scale", "weight"], "the model's own names, without prefix"
    with safe_open(path / "extra.safetensors", "pt") as file:
        assert list(file.keys()) == ["projection.weight"]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"MANIFEST.json"}
    assert [p.name for p in path.parent.iterdir()] == ["step_00001000"], "no temporary folder is left"


def test_loads_what_was_saved(save):
    checkpoint = load_checkpoint(save(7))
    assert checkpoint.step == 7
    assert set(checkpoint.objective_state) == {"model.weight", "model.scale", "projection.weight"}
    assert torch.equal(checkpoint.objective_state["model.weight"], torch.full((3, 2), 7.0))
    assert torch.equal(checkpoint.optimizer_state["exp_avg.model.scale"], torch.full((1,), 3.5))
    assert checkpoint.groups[0]["parameters"] == ["model.weight", "model.scale", "projection.weight"]
    assert checkpoint.train_state == {"step": 7, "samples_seen": 56}
    weights, config = read_model(checkpoint.path)
    assert set(weights) == {"weight", "scale"}
    assert config == {"task": "clip", "name": "tiny"}


def test_a_checkpoint_of_the_first_format_is_still_read(save):
    """It had one SHA-256 a file; the files themselves are the same."""
    path = save(3)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name, entry in manifest["files"].items():
        manifest["files"][name] = {"bytes": entry["bytes"], "sha256": layout.sha256_of(path / name)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"format": 1}))
    assert load_checkpoint(path).step == 3
    (path / "groups.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"groups\.json has 2 bytes"):
        verify(path)


def test_a_part_of_a_tensor_is_read_alone(save):
    checkpoint = load_checkpoint(save(7))
    weight = checkpoint.objective_state["model.weight"]
    assert torch.equal(checkpoint.objective_state.piece("model.weight", 2, 3), weight.flatten()[2:5])


def test_without_extra_weights_there_is_no_extra_file(save):
    path = save(1, has_extra=False)
    assert not (path / "extra.safetensors").exists()
    assert set(load_checkpoint(path).objective_state) == {"model.weight", "model.scale"}


def test_retention_keeps_the_newest(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step, keep=2)
    assert [step for step, _ in layout.steps_in(tmp_path / "checkpoints")] == [3, 4]


def test_a_step_reached_again_replaces_the_damaged_one(save, tmp_path):
    save(1)
    (save(2) / "model.safetensors").write_bytes(b"")
    verify(save(2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]


def test_latest_of_run_folder_or_checkpoints_folder(save, tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save(5)
    newest = save(12)
    assert latest_checkpoint(tmp_path) == newest
    assert latest_checkpoint(tmp_path / "checkpoints") == newest


def test_not_a_number_in_the_state_is_refused_before_anything_is_replaced(save, tmp_path):
    save(1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        layout.write_json_entry(tmp_path / "state.json", {"loss": float("nan")})


def test_a_file_where_the_folder_should_be(save, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be saved") as error:
        save(1, folder=tmp_path / "file")
    assert str(tmp_path / "file") in (error.value.where or "")


def test_a_recipe_with_credentials_is_for_this_user_alone(save) -> None:
    before = os.umask(0o022)
    try:
        open_, closed = save(1), save(2, resolved_toml='token = "abc"\n')
    finally:
        os.umask(before)
    assert [(folder / "resolved.toml").stat().st_mode & 0o777 for folder in (open_, closed)] == [0o644, 0o600]
    assert (closed / "resolved.toml").read_text() == 'token = "abc"\n'
    assert load_checkpoint(closed).step == 2  # its checksum is in the manifest
