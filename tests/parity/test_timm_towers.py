"""timm's own towers, which released presets use, against the tower that our configuration describes."""

import pytest
import timm
import torch
from golden import relative
from timm.models.eva import Eva

from evatool.model.presets import PRESETS
from evatool.model.vision import STOCK_NAMES, TIMM_NAMES, eva_arguments

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("preset", [preset for preset, name in TIMM_NAMES.items() if name in STOCK_NAMES])
@torch.no_grad()
def test_one_block_of_the_released_width(preset):
    config = PRESETS[preset]
    torch.manual_seed(0)
    theirs = timm.create_model(TIMM_NAMES[preset], depth=1, num_classes=8, global_pool="token").eval()
    ours = Eva(**eva_arguments(config) | {"depth": 1, "num_classes": 8}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for mine, stock in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(mine) is type(stock)
        assert getattr(mine, "eps", None) == getattr(stock, "eps", None)
    image = torch.randn(1, 3, config.image_size, config.image_size)
    assert relative(ours(image), theirs(image)) <= 1e-6
