"""Power loss at every moment of a save: what was not flushed is gone, zeroed or there (row R5 of
docs/faults.md).
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from recorded_disk import Node, record, replay

from evatool.checkpoint import layout
from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import CheckpointError

SURVIVALS = ["nothing", "all", "zeros", "some", "some"]


def outcomes(folder: Path, before: Path, log: list, scratch: Path) -> list[tuple[int, int]]:
    """(operations done, step found) of every crash; the checkpoint found is whole and has its step's weights."""
    found = []
    for done in range(len(log) + 1):
        for number, survival in enumerate(SURVIVALS):
            left, pick = scratch / "left", random.Random(1000 * done + number)
            replay(folder, Node.of(before), log[:done]).after_power_loss(left, pick, survival)
            newest = latest_checkpoint(left)
            assert newest is not None, (done, survival)
            checkpoint = load_checkpoint(newest)
            assert torch.equal(
                checkpoint.objective_state["model.weight"], torch.full((3, 2), float(checkpoint.step))
            ), (done, survival)
            found.append((done, checkpoint.step))
            shutil.rmtree(left)
    return found


@pytest.mark.parametrize("is_reached_again", [False, True], ids=["new step", "step reached again"])
def test_a_whole_checkpoint_is_found_and_a_finished_save_stays(save, tmp_path, is_reached_again):
    folder = save(1).parent
    if is_reached_again:
        (save(2) / layout.MODEL).write_bytes(b"damaged")
    before = tmp_path / "before"
    shutil.copytree(folder, before)
    with pytest.MonkeyPatch.context() as patch:
        log = record(patch)
        save(2, keep=1)
    kinds = [operation[0] for operation in log]
    assert len(log) > 40
    found = outcomes(folder, before, log, tmp_path)
    assert {step for _, step in found} == {1, 2}
    committed = kinds.index("flush", len(kinds) - kinds[::-1].index("rename"))  # the folder's, after the last rename
    assert all(step == 2 for done, step in found if done > committed), "what was said to be saved is"


@pytest.mark.parametrize("forgotten", ["file", "folder"])
def test_a_save_that_forgets_to_flush_is_found_out(save, tmp_path, forgotten):
    """So that the test above says something."""
    folder = save(1).parent
    before = tmp_path / "before"
    shutil.copytree(folder, before)
    with pytest.MonkeyPatch.context() as patch:
        log = record(patch)
        save(2, keep=1)
    is_file = {operation[1] for operation in log if operation[0] == "write"}
    log = [o for o in log if not (o[0] == "flush" and (o[1] in is_file) == (forgotten == "file"))]
    with pytest.raises((CheckpointError, AssertionError)):
        outcomes(folder, before, log, tmp_path)
