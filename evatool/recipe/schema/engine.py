"""How the training step is carried out. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Positive, PositiveFloat, Section


class EngineSection(Section):
    """How the training step is carried out over processes and devices; what works with what is in docs/engines.md."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """Engine that carries out the step. `auto` is `single` in one process and `fsdp2` in several. `fsdp2` is PyTorch's
    own: weights, gradients and moments are divided over the ranks. `ddp` keeps all of them whole on every rank, for
    models that fit. `deepspeed` is ZeRO, for `zero_stage` and `offload`."""
    processes: Positive | None = None
    """Number of processes to start on this machine. When absent, one is started for each GPU, or one where there are
    none. It is ignored under torchrun, which starts the processes itself."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What DeepSpeed divides over the ranks: 0 nothing, 1 the moments, 2 also the gradients, 3 also the weights. Higher
    stages need less memory and more communication. It needs `kind = "deepspeed"`."""
    offload: Literal["none", "optimizer", "optimizer-and-weights"] = "none"
    """What DeepSpeed keeps in the machine's own memory instead of the GPU's. `optimizer` moves moments and master
    weights, which are then stepped on the CPU (ZeRO 1 to 3); `optimizer-and-weights` moves the weights too (ZeRO 3). It
    works with AdamW only, and is slow: use it where a model fits no other way."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block computes again in its backward pass instead of keeping it. `full` keeps only the block's input and
    repeats a third of the work; `selective` also keeps the results of matrix products and attention and repeats little;
    `none` is fastest and needs most memory. `evatool plan` shows the difference."""
    compile: bool = False
    """Whether every transformer block is compiled with torch.compile, where a compiler is found. It takes a while at
    the start and makes the steps after that faster."""

    hang_timeout_sec: PositiveFloat = 600.0
    """Longest time in seconds without a finished step, saves and evaluations included, before the run ends with exit
    code 76. Raise it where one evaluation or save takes longer than ten minutes."""

    @model_validator(mode="after")
    def _settings_reach_the_engine(self) -> EngineSection:
        problems = [problem for is_wrong, problem in self._rules() if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        is_zero, offload = self.kind == "deepspeed", f'offload = "{self.offload}"'
        offloads = self.offload != "none"
        return [
            (
                self.zero_stage > 0 and not is_zero,
                f'zero_stage = {self.zero_stage} has no effect with kind = "{self.kind}": set kind = "deepspeed"',
            ),
            (
                self.kind == "single" and (self.processes or 1) > 1,
                f'kind = "single" is one process, but processes = {self.processes}: use kind = "fsdp2"',
            ),
            (
                offloads and not is_zero,
                f'{offload} is DeepSpeed\'s, but kind = "{self.kind}": set kind = "deepspeed" and a zero_stage',
            ),
            (
                is_zero and offloads and self.zero_stage == 0,
                f"{offload} moves what ZeRO divides, but zero_stage = 0 divides nothing: set zero_stage to 1, 2 or 3",
            ),
            (
                is_zero and self.offload == "optimizer-and-weights" and self.zero_stage in (1, 2),
                f'{offload} needs zero_stage = 3, which alone divides weights: set it, or offload = "optimizer"',
            ),
            (
                is_zero and self.activation_checkpointing == "selective" and self.zero_stage == 3,
                # its linear layers add biases in place to the very products that are kept: gradients come out wrong
                'activation_checkpointing = "selective" is wrong under ZeRO-3, whose layers change what is kept: '
                'set activation_checkpointing = "full", zero_stage to 0, 1 or 2, or kind = "fsdp2"',
            ),
            (
                is_zero and self.compile and self.zero_stage == 3,
                "compile = true cannot see through the hooks with which ZeRO-3 fetches weights: set zero_stage to 0, "
                '1 or 2, or kind = "fsdp2"',
            ),
        ]
