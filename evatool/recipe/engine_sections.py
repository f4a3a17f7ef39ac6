"""How the training step is carried out. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.section import Positive, Section


class EngineSection(Section):
    """How the training step is carried out; what works with what is in docs/engines.md."""

    kind: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """`auto`: `single` in one process, `fsdp2` in several. `fsdp2`: PyTorch's own, weights, gradients and moments
    divided over ranks. `ddp`: its replicated mode, all of them whole on every rank. `deepspeed`: ZeRO."""
    processes: Positive | None = None
    """Processes to start on this machine; one a GPU, or one without GPUs, when absent. Ignored under torchrun."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What DeepSpeed divides over ranks: 0 nothing, 1 moments, 2 gradients too, 3 weights too."""

    @model_validator(mode="after")
    def _settings_reach_the_engine(self) -> EngineSection:
        if self.zero_stage > 0 and self.kind != "deepspeed":
            raise ValueError(
                f'zero_stage = {self.zero_stage} has no effect with kind = "{self.kind}": set kind = "deepspeed"'
            )
        if self.kind == "single" and (self.processes or 1) > 1:
            raise ValueError(f'kind = "single" is one process, but processes = {self.processes}: use kind = "fsdp2"')
        return self
