"""What one sample costs in a training step, part by part: towers, loss terms and teachers. No torch.

The planner and the throughput meter of a running job both count with `step_costs`, so that they cannot disagree. A
part is one function here, from the configuration of the model that it runs: closed formulas (`towers.py` for
operations, `memory.py` for activations). A model without a formula comes with figures that were traced (`traced.py`).

The losses themselves are not counted: their products of features are small beside the towers.
Source: docs/reference/memory-and-scale.md#operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from evatool.model.config import ModelConfig, mim_config
from evatool.plan import locked, towers
from evatool.plan import memory as mem
from evatool.plan.locked import Locks
from evatool.plan.memory import Activations, Checkpointing, Numerics
from evatool.plan.towers import Blocks
from evatool.plan.traced import TracedModel
from evatool.recipe.schema import TrainClipRecipe, TrainingRecipe

TeacherModel = ModelConfig | TracedModel
"""A teacher's architecture: a configuration, for which there are formulas, or the figures of one that was traced."""
Stage = Literal["train-clip", "pretrain-mim", "distill"]


@dataclass(frozen=True)
class StepWork:
    """What one sample goes through in a training step.

    Attributes:
        model: the model that learns: a CLIP, or a MIM model in pretrain-mim.
        teachers: those that run at every step; what is stored costs nothing.
        masked: hidden patches of a masked picture; 0 where nothing is masked.
        joint: the image tower with its prediction head, where train-clip learns both losses in one stage.
        locks: frozen parts of the towers.
        dropout_shares: (share of the samples, share of dropped patches); the first shares sum to 1.
        text_tokens: computed tokens of a caption; the whole context when None.
    """

    stage: Stage
    model: ModelConfig
    teachers: tuple[TeacherModel, ...] = ()
    masked: int = 0
    joint: ModelConfig | None = None
    locks: Locks = field(default_factory=Locks)
    dropout_shares: tuple[tuple[float, float], ...] = ((1.0, 0.0),)
    text_tokens: int | None = None

    @property
    def learns_patches(self) -> bool:
        """Whether a teacher's patch features are learned, not its embeddings."""
        return self.stage == "pretrain-mim" or self.joint is not None


@dataclass(frozen=True)
class PartCost:
    """One tower or loss term of the model that learns, for one sample.

    Attributes:
        forward: operations of its forward pass.
        forward_only: those of them that no backward pass follows, since they are frozen.
        blocks: stacks of blocks whose weights are this part's own.
        idle_blocks: frozen blocks of the first of them.
        activations: bytes that it keeps for the backward pass.
    """

    name: str
    forward: int
    activations: Activations
    forward_only: int = 0
    blocks: tuple[Blocks, ...] = ()
    idle_blocks: int = 0

    @property
    def backward(self) -> int:
        """Operations of its backward pass: two products for each product of the forward pass that learns."""
        return 2 * (self.forward - self.forward_only)


@dataclass(frozen=True)
class TeacherCost:
    """A frozen model that runs at every step, for one sample.

    Attributes:
        forward: operations of what is asked of it.
        params: all its parameters.
        working_bytes: memory that it takes for a moment.
        target_numbers: features that the loss is given.
    """

    name: str
    forward: int
    params: int
    working_bytes: int
    target_numbers: int


@dataclass(frozen=True)
class Costs:
    """All parts of a step."""

    parts: tuple[PartCost, ...]
    teachers: tuple[TeacherCost, ...]

    @property
    def flops(self) -> int:
        """Operations a sample that utilisation (MFU) is counted on: nothing that is computed a second time."""
        learned = sum(part.forward + part.backward for part in self.parts)
        return learned + sum(teacher.forward for teacher in self.teachers)

    def forward(self, *names: str) -> int:
        """Operations of the forward passes of the parts with these names."""
        return sum(part.forward for part in self.parts if part.name in names)


def step_costs(
    step: StepWork, numerics: Numerics = mem.NUMERICS["fp32"], *, checkpointing: Checkpointing = "none"
) -> Costs:
    """Costs of every part of a step.

    Args:
        numerics, checkpointing: decide on bytes of activations alone; operations do not depend on them.
    """
    if step.stage == "pretrain-mim":
        parts: tuple[PartCost, ...] = (mim_student_cost(step.model, step.masked, numerics, checkpointing),)
    else:
        parts = (image_tower_cost(step, numerics, checkpointing), text_tower_cost(step, numerics, checkpointing))
        if step.joint is not None:
            parts += (mim_term_cost(step.joint, step.masked, numerics, checkpointing),)
    cost_of = patch_teacher_cost if step.learns_patches else clip_teacher_cost
    return Costs(parts, tuple(cost_of(model, step.text_tokens, numerics) for model in step.teachers))


def flops_per_sample(
    recipe: TrainingRecipe,
    config: ModelConfig,
    *,
    teachers: Sequence[TeacherModel] = (),
    masked: int = 0,
    predict_dim: int | None = None,
) -> int:
    """Operations a sample of a running job: forward and backward pass of what learns, forward pass of the rest.

    Captions count with all their tokens, and patches are dropped as at the start of the run.

    Args:
        config: of the model that learns; a MIM model's own in pretrain-mim.
        teachers: those that run at every step.
        masked: hidden patches of a masked picture.
        predict_dim: width of the features that `[objective.mim]` of train-clip predicts.
    """
    stage = recipe.stage  # type: ignore[attr-defined]
    if stage == "pretrain-mim":
        return step_costs(StepWork(stage, config, tuple(teachers), masked)).flops
    section = recipe.model  # type: ignore[attr-defined]
    has_mim = isinstance(recipe, TrainClipRecipe) and recipe.objective.mim is not None
    step = StepWork(
        stage,
        config,
        tuple(teachers),
        masked,
        joint=joint_tower(config, predict_dim or 0) if has_mim else None,
        locks=Locks(section.lock.visual, section.lock.text),
        dropout_shares=((1.0, section.patch_dropout),),
    )
    return step_costs(step).flops


# ------------------------------------------------------------------------------------------- the model that learns


def image_tower_cost(step: StepWork, numerics: Numerics, checkpointing: Checkpointing) -> PartCost:
    """The image tower's pass over one picture; operations over all phases, memory of the one with most patches."""
    config, locks = step.model, step.locks
    idle_blocks, _ = locked.idle_blocks(config, locks)
    shares = step.dropout_shares
    return PartCost(
        "image",
        round(sum(part * towers.image_flops(config, dropped) for part, dropped in shares)),
        mem.image_activations(
            config,
            numerics,
            patch_dropout=min(dropped for _, dropped in shares),
            checkpointing=checkpointing,
            idle_blocks=idle_blocks if locks.visual is not None and config.is_eva else None,
            is_locked=locks.visual == "all",
        ),
        round(sum(part * locked.image_forward_only_flops(config, locks, dropped) for part, dropped in shares)),
        (towers.image_blocks(config),),
        idle_blocks,
    )


def text_tower_cost(step: StepWork, numerics: Numerics, checkpointing: Checkpointing) -> PartCost:
    """The text tower's pass over one caption."""
    config, locks = step.model, step.locks
    _, idle_blocks = locked.idle_blocks(config, locks)
    return PartCost(
        "text",
        towers.text_flops(config, step.text_tokens),
        mem.text_activations(
            config,
            numerics,
            tokens=step.text_tokens,
            checkpointing=checkpointing,
            idle_blocks=idle_blocks,
            is_locked=locks.text == "all",
        ),
        locked.text_forward_only_flops(config, locks, step.text_tokens),
        (towers.text_blocks(config),),
        idle_blocks,
    )


def mim_student_cost(config: ModelConfig, masked: int, numerics: Numerics, checkpointing: Checkpointing) -> PartCost:
    """A MIM model's pass over one masked picture, prediction head and decoder included."""
    blocks = [towers.image_blocks(config)]
    if config.decoder is not None:
        blocks.append(towers.decoder_blocks(config))
    return PartCost(
        "image",
        towers.mim_flops(config, masked),
        mem.mim_activations(config, numerics, masked, checkpointing=checkpointing),
        blocks=tuple(blocks),
    )


def mim_term_cost(joint: ModelConfig, masked: int, numerics: Numerics, checkpointing: Checkpointing) -> PartCost:
    """Masked image modelling beside a contrastive loss: a second pass through the same tower, and the head."""
    activations = mem.mim_activations(joint, numerics, masked, checkpointing=checkpointing)
    return PartCost("mim", towers.mim_flops(joint, masked), activations)


def joint_tower(config: ModelConfig, predict_dim: int) -> ModelConfig:
    """The image tower of a CLIP as the student of `[objective.mim]`, with a head of `predict_dim` features."""
    return replace(mim_config(config, predict_dim), vision=config.vision)  # with the CLIP's norms inside the attention


# -------------------------------------------------------------------------------------------------------- teachers


def clip_teacher_cost(model: TeacherModel, text_tokens: int | None, numerics: Numerics) -> TeacherCost:
    """A CLIP whose embeddings of picture and caption are learned. Raises: ValueError for a model that is no CLIP."""
    if isinstance(model, TracedModel):
        raise ValueError(f"{model.name} has no text tower to learn from")
    forward = towers.image_flops(model) + towers.text_flops(model, text_tokens)
    return _teacher(model, forward, 2 * (model.embed_dim or 0), numerics)


def patch_teacher_cost(model: TeacherModel, text_tokens: int | None, numerics: Numerics) -> TeacherCost:
    """A model whose patch features are learned; it reads no captions."""
    if isinstance(model, TracedModel):
        working = model.working_numbers * numerics.compute
        return TeacherCost(model.name, model.flops, model.params, working, model.num_patches * model.embed_dim)
    numbers = towers.num_patches(model) * (model.embed_dim or 0)
    return _teacher(model, towers.image_flops(model, all_tokens=True), numbers, numerics)


def _teacher(config: ModelConfig, forward: int, target_numbers: int, numerics: Numerics) -> TeacherCost:
    tokens = 1 + towers.num_patches(config)
    return TeacherCost(
        config.name,
        forward,
        towers.count_parameters(config).total,
        mem.teacher_activations(towers.image_blocks(config), tokens, numerics),
        target_numbers,
    )
