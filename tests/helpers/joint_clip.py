"""A joint objective around a real EVA tower of the debug size, in float64, with its batch and teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tiny_clip import make_batch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.model.clip import build_clip
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset
from evatool.objective.build import PatchTargets, build_objective
from evatool.objective.clip import ClipObjective
from evatool.recipe import schema

NUM_MASKED = 7
WIDTH = 12  # of the teacher's features


class LinearTeacher:
    """Patch features of one linear layer, 16 patches of 8 x 8 pixels."""

    def __init__(self) -> None:
        self.head = nn.Linear(3 * 8 * 8, WIDTH).double()
        self.seen: list[Tensor] = []

    def visual_tokens(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        patches = nn.functional.unfold(image.to(self.head.weight.dtype) / 255, kernel_size=8, stride=8).transpose(1, 2)
        return self.head(patches)


@dataclass
class JointParts:
    objective: ClipObjective
    batch: Batch
    teacher: LinearTeacher
    config: ModelConfig


def joint_parts(kind: str, weight: float = 1.0) -> JointParts:
    """Args: kind: of the contrastive loss."""
    torch.manual_seed(0)
    debug = resolve_preset("EVA02-CLIP-debug")
    config = replace(debug, text={**debug.text, "vocab_size": 49_408, "width": 16, "heads": 2})
    teacher = LinearTeacher()
    mim = schema.JointMim(weight=weight)
    section = schema.SigmoidObjective(mim=mim) if kind == "sigmoid" else schema.InfoNceObjective(mim=mim)
    model = build_clip(config)
    patches = PatchTargets(teacher, predict_dim=WIDTH, num_masked=NUM_MASKED, width=config.width)
    objective = build_objective(section, model, patches=patches).double()
    batch = make_batch(8, context_length=16, image_size=32)
    generator = torch.Generator().manual_seed(1)
    counts = [NUM_MASKED, 3, 5, 1, NUM_MASKED, 2, 6, 4]
    ranks = torch.rand(8, 16, generator=generator).argsort(1).argsort(1)
    batch.mask = ranks < torch.tensor(counts)[:, None]
    return JointParts(objective, batch, teacher, config)
