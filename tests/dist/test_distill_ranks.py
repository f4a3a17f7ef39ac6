"""Distillation's losses on 1, 2 and 4 ranks in float32 against one dense float64 process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_distill import dense_interactive, dense_relation, dense_sigmoid_divergence, dense_softmax_divergence
from dense_loss import dense_infonce, dense_sigmoid
from tiny_distill import section_of, teachers_of, tiny_distillation
from torch import Tensor

from evatool.model.features import l2_normalize
from evatool.distributed.collectives import rank, world_size
from evatool.objective.tiled import tiles
from evatool.objective.clip import ClipObjective
from evatool.core.batch import Batch

pytestmark = pytest.mark.dist

KINDS = ["distill, all parts, two teachers", "distill, sigmoid, two teachers"]
LEAVES = ["image", "text", "scale", "bias", "image projection", "text projection"]
SCALE, BIAS, LARGE_SCALE = 10.0, -6.0, 9.0


def global_batch() -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Leaves, the teachers' embeddings and caption ids of 32 samples, float64 at a float32 point."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    text = draw(32, 8)
    features = [l2_normalize(text + draw(32, 8)), l2_normalize(text)]
    teachers = {}
    for name, width in (("small", 6), ("large", 8)):
        shared = text @ draw(8, width)
        teachers[f"teacher_image/{name}"] = l2_normalize(shared + draw(32, width))
        teachers[f"teacher_text/{name}"] = l2_normalize(shared + 0.3 * draw(32, width))
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (SCALE, BIAS)]
    leaves = [*features, *scalars, draw(6, 8) / 3, draw(6, 8) / 3]
    leaves = [leaf.float().double() for leaf in leaves]
    return leaves, {name: x.float().double() for name, x in teachers.items()}, torch.arange(32) % 13


def with_projections(leaves: list[Tensor]) -> dict[str, Tensor]:
    image, text, scale, bias, for_image, for_text = leaves
    projected = {
        "projected_image/small": l2_normalize(F.linear(image, for_image)),
        "projected_text/small": l2_normalize(F.linear(text, for_text)),
    }
    return {"image": image, "text": text, "scale": scale, "bias": bias, **projected}


def module_of(kind: str) -> ClipObjective:
    module = tiny_distillation(kind)
    teachers_of(module)[1].clip.logit_scale = LARGE_SCALE
    return module


def answers() -> dict[str, list[Tensor]]:
    """This rank's loss and gradients, with tiles smaller than a rank's block and not dividing it."""
    tiles.TILE_SIDE["cpu"] = 3
    size = 32 // world_size()
    rows = slice(rank() * size, (rank() + 1) * size)
    found = {}
    for kind in KINDS:
        leaves, teachers, ids = global_batch()
        own = [leaf[rows] if i < 2 else leaf for i, leaf in enumerate(leaves)]
        own = [leaf.float().requires_grad_() for leaf in own]
        features = with_projections(own)
        if "sigmoid" not in kind:
            del features["bias"]
        features |= {name: x[rows].float() for name, x in teachers.items()}
        batch = Batch(image=torch.empty(0), keys=[], caption_id=ids[rows])
        loss = module_of(kind).losses(features, batch)["loss"]
        grads = torch.autograd.grad(loss / world_size(), own, allow_unused=True, materialize_grads=True)
        found[kind] = [loss.detach(), *grads]
    return found


def dense(kind: str) -> list[Tensor]:
    leaves, teachers, ids = global_batch()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    module, (image, text, scale, bias, *_) = module_of(kind), leaves
    features, section = with_projections(leaves), section_of(kind)
    is_sigmoid = section.loss == "sigmoid"
    student = image, text
    total = dense_sigmoid(*student, scale, bias, ids) if is_sigmoid else dense_infonce(*student, scale, ids)
    for teacher in teachers_of(module):
        theirs = teachers[f"teacher_image/{teacher.name}"], teachers[f"teacher_text/{teacher.name}"]
        wide = tuple(features.get(f"projected_{tower}/{teacher.name}", features[tower]) for tower in ("image", "text"))
        known = theirs, teacher.logit_scale
        temperature = section.logit_temperature
        part = section.feature_weight * (F.mse_loss(wide[0], theirs[0]) + F.mse_loss(wide[1], theirs[1]))
        if is_sigmoid:
            part = part + dense_sigmoid_divergence(student, scale, bias, *known, teacher.bias, temperature)
        else:
            part = part + dense_softmax_divergence(student, scale, *known, temperature)
        part = part + section.relation_weight * dense_relation(student, theirs)
        crossed = dense_interactive(wide, theirs, scale, ids, bias if is_sigmoid else None)
        total = total + teacher.weight * (part + section.interactive_weight * crossed)
    return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_float32_gradients_of_features_scalars_and_projections(run_on_ranks, num_ranks: int) -> None:
    """In relative L2, at most 1e-6; all parts with two teachers, of which one is of another width."""
    by_rank = run_on_ranks(answers, num_ranks)
    for kind in KINDS:
        parts = list(zip(*(answer[kind] for answer in by_rank), strict=True))
        found = [torch.stack(parts[0]).mean(), torch.cat(parts[1]), torch.cat(parts[2])]
        found += [torch.stack(part).sum(0) for part in parts[3:]]
        for name, ours, theirs in zip(["loss", *LEAVES], found, dense(kind), strict=True):
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm()), (kind, name)
