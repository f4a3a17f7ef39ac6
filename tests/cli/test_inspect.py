"""`evatool inspect` prints what `load_clip` would use, and who says it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evatool.cli.app import app
from tests.model.test_description import HALF, VIT, described

runner = CliRunner()


def facts_of(*arguments: str) -> dict[str, dict[str, object]]:
    done = runner.invoke(app, ["inspect", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    facts: dict[str, dict[str, object]] = json.loads(done.stdout)
    return facts


def test_a_described_folder(tmp_path: Path) -> None:
    folder = described(tmp_path, {"vision_cfg": VIT, "quick_gelu": True, "init_logit_bias": -10.0}, HALF)
    facts = facts_of(str(folder))
    assert facts["activation"] == {"value": "QuickGELU", "where": "open_clip_config.json"}
    assert facts["mean"] == {"value": [0.5, 0.5, 0.5], "where": "open_clip_config.json"}
    assert facts["resize"]["value"] == "squash"
    assert facts["image_size"]["value"] == [32, 32]
    assert facts["logit_bias"]["value"] == pytest.approx(-10.0)
    assert facts["precision"]["value"] == "float32"


def test_a_tag_is_known_without_its_weights() -> None:
    facts = facts_of("open_clip:convnext_base")
    assert "convnext_base" in str(facts["architecture"]["value"])


def test_a_preset() -> None:
    assert facts_of("EVA02-CLIP-debug")["architecture"]["value"] == "EVA, 2 blocks of width 64, patches of 8"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    done = runner.invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code != 0
