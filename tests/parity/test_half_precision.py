"""Half-precision models against float64: no worse than the same model with everything cast, as the releases run it."""

import pytest
import torch
from golden import CLIP_FILES, read_golden, relative

import evatool
from evatool.inference.loaded_clip import DTYPES
from evatool.model.clip import build_clip
from evatool.weights.load import load_clip_weights

pytestmark = pytest.mark.parity

# Both errors are rounding noise of the same size; worst measured ratio 1.04 (bf16, eva02-clip-b16).
NOISE = 1.1


def cast_whole(golden, dtype):
    """Weights and buffers alike, RoPE tables included."""
    clip = build_clip(golden.config).eval()
    load_clip_weights(clip, golden.state)
    return clip.to(dtype)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CLIP_FILES)
@torch.no_grad()
def test_error_against_float64(name, precision, tmp_path):
    golden = read_golden(name)
    torch.save(golden.state, tmp_path / "weights.pt")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(64, 3, golden.config.image_size, golden.config.image_size, generator=generator)
    tokens = golden.inputs["tokens"]
    exact, whole = cast_whole(golden, torch.float64), cast_whole(golden, DTYPES[precision])
    ours = evatool.load_clip(tmp_path / "weights.pt", model_config=golden.config, precision=precision)

    true_image, true_text = exact.encode_image(image.double()), exact.encode_text(tokens)
    error = relative(ours.encode_image(image), true_image)
    assert 0 < error <= NOISE * relative(whole.encode_image(image.to(DTYPES[precision])), true_image)
    error = relative(ours.encode_text(tokens), true_text)
    assert 0 < error <= NOISE * relative(whole.encode_text(tokens), true_text)
