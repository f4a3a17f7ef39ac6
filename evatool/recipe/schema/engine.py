"""How the training step is carried out. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Positive, PositiveFloat, Section


class EngineSection(Section):
    """How the training step is carried out; what works with what is in docs/engines.md."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """`auto`: `single` in one process, `fsdp2` in several. `fsdp2`: PyTorch's own, weights, gradients and moments
    divided over ranks. `ddp`: its replicated mode, all of them whole on every rank. `deepspeed`: ZeRO."""
    processes: Positive | None = None
    """Processes to start on this machine; one a GPU, or one without GPUs, when absent. Ignored under torchrun."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What DeepSpeed divides over ranks: 0 nothing, 1 moments, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "optimizer-and-weights"] = "none"
    """What DeepSpeed keeps in the machine's own memory instead of the GPU's: moments and master weights (ZeRO 1 to 3,
    stepped on the CPU), or the weights too (ZeRO 3). AdamW only."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block computes again in its backward pass instead of keeping it: nothing, all but matrix products and
    attention, or everything."""
    compile: bool = False
    """Compile every block with torch.compile, where a compiler is found."""

    hang_timeout_sec: PositiveFloat = 600.0
    """Longest time without a finished step, saves and evaluations included, before the run ends with exit code 76."""

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
