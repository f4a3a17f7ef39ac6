"""`evatool suites` and `evatool compare` through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from eval_runs import a_run
from typer.testing import CliRunner

from evatool.cli.app import app


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_suites_are_listed() -> None:
    code, out, _ = invoke("suites", "list", "--json")
    found = {s["name"]: s["sets"] for s in json.loads(out)["suites"]}
    assert code == 0
    assert len(found["eva27"]) == 27
    assert set(found) == {"drawings", "drawings-localised", "eva27", "imagenet-robustness", "retrieval"}


def test_a_suite_says_what_is_there_and_how_to_get_the_rest(tmp_path: Path) -> None:
    (tmp_path / "flickr30k").mkdir()
    code, out, _ = invoke("suites", "show", "retrieval", "--data", str(tmp_path), "--json")
    flickr, coco = json.loads(out)["sets"]
    assert code == 0
    assert (flickr["present"], coco["present"]) == (True, False)
    assert coco["num_samples"] == 5000
    assert coco["looks_in"][0] == str(tmp_path / "mscoco_captions")
    expected = (
        f"hf download --repo-type dataset clip-benchmark/wds_mscoco_captions --local-dir {tmp_path}/mscoco_captions"
    )
    assert coco["command"] == expected
    _, out, _ = invoke("suites", "show", "retrieval", "--data", str(tmp_path))
    assert f"mscoco_captions: {expected}" in out
    assert "flickr30k:" not in out


def test_an_unknown_suite_names_the_nearest() -> None:
    code, _, err = invoke("suites", "show", "eva28")
    assert code == 2
    assert "did you mean 'eva27'" in err


def test_compare_says_which_is_better_and_writes_a_report(tmp_path: Path) -> None:
    a, b = a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.6)
    code, out, err = invoke("compare", str(a), str(b), "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert "b/model 0 is better than model 0 by 1" in out
    assert "points on the average of six imagenets" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "evatool compare" in page
    assert "Beside published numbers" not in page  # the made-up rows have none
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.csv",
        "results.md",
        "report.html",
    }
    code, out, _ = invoke("compare", str(a), str(b), "--json")
    assert json.loads(out)["differences"][0]["before"] == "model 0"


def test_compare_without_answers_says_what_to_do(tmp_path: Path) -> None:
    a, b = a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.6)
    shutil.rmtree(b / "predictions")
    code, _, err = invoke("compare", str(a), str(b))
    assert code == 1
    assert "run evatool eval again" in err


@pytest.mark.parametrize("module", ["evatool.eval.compare", "evatool.eval.report.page", "evatool.eval.suite"])
def test_comparing_needs_no_torch(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
