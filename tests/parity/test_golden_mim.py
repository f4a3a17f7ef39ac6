"""MIM models against the original EVA-01 and EVA-02 code: predictions, loss and gradients."""

import pytest
import torch.nn.functional as F
from golden import MIM_FILES, TOLERANCE, read_golden, relative

from evatool.model.mim import build_mim
from evatool.weights.load import load_mim_weights

pytestmark = pytest.mark.parity

OURS = {"mask_token": "mask_token", "lm_head.weight": "lm_head.weight"}


def run(name, grad_scale):
    golden = read_golden(name)
    model = build_mim(golden.config, predict_dim=golden.config.predict_dim, patch_embed_grad_scale=grad_scale).train()
    report = load_mim_weights(model, golden.state)
    assert not report.fresh
    prediction = model(golden.inputs["image"], golden.inputs["mask"])
    target = golden.inputs["teacher_features"][golden.inputs["mask"]]
    loss = -F.cosine_similarity(prediction, target, dim=-1).mean()
    loss.backward()
    return golden, model, prediction, loss


@pytest.mark.parametrize("name", MIM_FILES)
def test_prediction_and_loss(name):
    golden, _, prediction, loss = run(name, grad_scale=1.0)
    assert relative(prediction, golden.expected["prediction_at_masked"]) <= TOLERANCE
    assert relative(loss, golden.expected["loss"]) <= TOLERANCE


@pytest.mark.parametrize("name", MIM_FILES)
def test_gradients(name):
    golden, model, _, _ = run(name, grad_scale=1.0)  # the files were made without the scaled patch gradient
    gradients = {k.removeprefix("grad."): v for k, v in golden.expected.items() if k.startswith("grad.")}
    assert len(gradients) >= 4
    for theirs, expected in gradients.items():
        ours = model.get_parameter(OURS.get(theirs, f"visual.{theirs}")).grad
        assert relative(ours, expected) <= TOLERANCE, theirs


@pytest.mark.parametrize("name", MIM_FILES)
def test_gradient_scale_reaches_the_patch_embedding_and_nothing_else(name):
    golden, model, prediction, _ = run(name, grad_scale=0.1)
    assert relative(prediction, golden.expected["prediction_at_masked"]) <= TOLERANCE
    patch = golden.expected["grad.patch_embed.proj.weight"]
    assert relative(model.visual.patch_embed.proj.weight.grad, 0.1 * patch) <= TOLERANCE
    assert relative(model.mask_token.grad, golden.expected["grad.mask_token"]) <= TOLERANCE
