"""A digest of named tensors, by which two models are the same or not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

from evatool.formats.safetensors import tensor_bytes


def weights_fingerprint(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex of a text and of tensors with their names, shapes and dtypes.

    Args:
        about: what the tensors do not tell, such as the configuration of the model.
        tensors: in an order that follows from the model alone; one at a time is held on the CPU.
    """
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()
