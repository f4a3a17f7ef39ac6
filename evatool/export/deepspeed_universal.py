"""A checkpoint in DeepSpeed's universal format, which any ZeRO stage from 1 to 3 and any number of ranks loads.

    latest_universal                      the name of the folder
    step_00001000/
        mp_rank_00_model_states.pt        counters, and under `module` frozen weights and buffers
        zero_pp_rank_0_mp_rank_00_model_states.pt   the same under the name that ZeRO-3 looks for
        zero/optimizer_state.pt           parameter groups
        zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt

DeepSpeed loads it with `"checkpoint": {"load_universal": true}` in its configuration. It takes trained parameters by
name. Its optimiser keeps its own parameter groups and settings: universal checkpoints give every group those of the
first under ZeRO-3, and need equal groups under 1 and 2. `load_checkpoint` hands ours back as `client_state["groups"]`.
Under ZeRO 1 and 2 DeepSpeed 0.19 cannot load where a rank has no number of some group, such as one of the temperature
alone.
Frozen weights and buffers it leaves as they are: they are under `module` of the first file, for `load_state_dict(...,
strict=False)`.
Source: DeepSpeed 0.19, deepspeed/checkpoint/universal_checkpoint.py and runtime/zero.
Test: tests/dist/test_to_deepspeed.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
WRITTEN_FOR = "0.19.8"
"""The version of DeepSpeed whose reader this was written for and is tested with."""
MOST_GROUPS = 10_000
"""Parameter groups that a reader may have."""


def write_universal(
    folder: Path,
    name: str,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
    step: int,
    samples_seen: int,
    num_updates: int,
) -> list[Path]:
    """Write `folder/name` and `folder/latest_universal`, trained tensors one at a time; what is there is replaced.

    Args:
        weights: parameters and buffers; read one by one.
        moments: `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`; zeros where a trained parameter has none.
        groups: `parameters` (names) of each, and whatever else is to be told; plain values.
        num_updates: optimiser steps that were not skipped.
    Returns: every file, which has been read again and compared.
    Raises: CheckpointError where what is read differs.
    """
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    trained = [parameter for group in groups for parameter in group["parameters"]]
    files = [_write(part / path, value) for path, value in _tensor_files(trained, weights, moments, num_updates)]
    # Stage 3 gives every group what stands in the first entry of the inner list, the others by turns what stands in the
    # outer one, and leave groups out for which it has none: nothing for everybody.
    inner = {"state": {0: {"step": torch.tensor(float(num_updates))}}, "param_groups": [{}]}
    optimizer = {"ds_version": WRITTEN_FOR, "param_groups": [{}] * MOST_GROUPS, "optimizer_state_dict": inner}
    files.append(_write(part / "zero" / "optimizer_state.pt", optimizer))
    counters = {"global_steps": step, "global_samples": samples_seen, "skipped_steps": step - num_updates}
    state = {"ds_version": WRITTEN_FOR, "dp_world_size": 1, "mp_world_size": 1, "lr_scheduler": None} | counters
    state["groups"] = [dict(group) for group in groups]
    module = {key: weights[key] for key in weights if key not in set(trained)}
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        files.append(_write(part / file, state | {"module": module}))
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    latest = folder / ".latest_universal.part"
    latest.write_text(name)
    os.replace(latest, folder / "latest_universal")
    return [folder / "latest_universal", *(final / path.relative_to(part) for path in files)]


def _tensor_files(
    trained: Sequence[str], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], num_updates: int
) -> Iterator[tuple[str, Any]]:
    for name in trained:
        weight = weights[name].float()
        yield f"zero/{name}/fp32.pt", {"param": weight}
        for moment in MOMENTS:
            key = f"{moment}.{name}"
            value = moments[key].float().reshape(weight.shape) if key in moments else torch.zeros_like(weight)
            yield f"zero/{name}/{moment}.pt", {"param": value}
        yield f"zero/{name}/step.pt", torch.tensor(float(num_updates))


def _write(path: Path, value: Any) -> Path:
    """Write, flush and read again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    if not _equal(torch.load(path, weights_only=True), value):
        raise CheckpointError(
            f"{path.name} is read otherwise than it was written", where=str(path), fix="write it again"
        )
    return path


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)
