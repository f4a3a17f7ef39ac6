"""Made-up results and galleries for the tests of this folder."""

from __future__ import annotations

import numpy as np
import pytest
from toys import made_up_results

from evatool.eval.report.gallery import Found, Gallery, Item, ShownRetrieval, data_uri, encode_image_file
from evatool.eval.results import EvalFailure, EvalResults


@pytest.fixture
def results() -> EvalResults:
    """Two models, the second clearly better."""
    return made_up_results()


@pytest.fixture
def failed_results() -> EvalResults:
    """Two models and a set that failed."""
    made = made_up_results()
    made.failures.append(EvalFailure("second", "coarse-group", "class id 5 is out of range"))
    return made


@pytest.fixture
def image() -> bytes:
    """A PNG of 8 x 8 pixels."""
    return encode_image_file(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture
def gallery(image: bytes) -> Gallery:
    """One hit and one miss in both directions."""
    tile, words = Item(image=data_uri(image)), Item(caption="a <fine> cat")
    hit = ShownRetrieval("text_to_image", words, [Found(tile, True, 0.5)] + [Found(tile, False, 0.1)] * 4, 1, 9, None)
    miss = ShownRetrieval("text_to_image", words, [Found(tile, False, 0.1)] * 5, 8, 9, tile)
    named = ShownRetrieval("image_to_text", tile, [Found(words, True, 0.5)], 1, 9, None)
    unnamed = ShownRetrieval("image_to_text", tile, [Found(words, False, 0.5)], 7, 9, Item(caption="a dog"))
    return Gallery("second", "retrieval", [hit, named], [miss, unnamed])
