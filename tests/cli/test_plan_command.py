"""`evatool plan` on the command line."""

from __future__ import annotations

from fake_stage import Invoke, only_json

TOO_LARGE = ["--set", "model.preset=EVA-CLIP-18B", "--gpus", "8"]


def test_a_plan_is_printed(invoke: Invoke) -> None:
    result = invoke("plan", "demo/train-clip", "--gpus", "8", "--price-per-gpu-hour", "2")
    assert result.exit_code == 0
    for text in ("parameters", "ZeRO-3", "binding:", "advice:", "cost", "assumed:"):
        assert text in result.stdout


def test_what_does_not_fit_exits_1_and_still_says_all(invoke: Invoke) -> None:
    result = invoke("plan", "demo/train-clip", *TOO_LARGE)
    assert result.exit_code == 1
    assert "18,325,482,241 trainable" in result.stdout
    assert "more than one h100 has" in result.stderr


def test_json_holds_plan_and_refusal(invoke: Invoke) -> None:
    assert only_json(invoke("plan", "demo/train-clip", "--gpu", "cpu", "--json"))["fits"] is True
    said = only_json(invoke("plan", "demo/train-clip", *TOO_LARGE, "--json"))
    assert said["fits"] is False
    assert said["exit_code"] == 1
    assert "GiB a rank" in said["error"]["message"]


def test_recipe_faults_exit_2(invoke: Invoke) -> None:
    assert invoke("plan", "demo/eval").exit_code == 2
    assert invoke("plan", "demo/train-clip", "--gpu", "abacus").exit_code == 2
    assert invoke("plan", "demo/train-clip", "--gpus", "3").exit_code == 2
