"""DeepSpeed's ZeRO behind the engine interface: optimiser state, gradients and weights divided over ranks.

Weights and moments stay float32 and bf16 is autocast, as in the other engines, so all of them compute the same thing.
Optimisers are torch's or our own, so nothing of DeepSpeed is ever compiled and no compiler is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from evatool.distributed.engine import Bounds, Engine, autocast, poisoned_if_not_finite
from evatool.distributed.optimizer import (
    MOMENTS,
    NUM_UPDATES,
    LayerwiseOptimizer,
    Piece,
    checked_shape,
    load_moments,
    moments_of,
)
from evatool.distributed.replicated import check_names
from evatool.distributed.world import World
from evatool.errors import CheckpointError, DependencyError
from evatool.types import Batch, LossDict, ParamGroup


class _Autocasting(nn.Module):
    """The objective under autocast; inside the module because DeepSpeed switches off what is entered outside it."""

    def __init__(self, objective: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.objective, self._precision, self._device = objective, precision, device

    def forward(self, batch: Batch) -> LossDict:
        with autocast(self._precision, self._device):
            return self.objective(batch)


class ZeroEngine(Engine):
    """ZeRO stage 0 (nothing divided), 1 (moments), 2 (and gradients) or 3 (and weights)."""

    def __init__(
        self,
        world: World,
        objective: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        zero_stage: int,
        precision: str,
        grad_clip_norm: float | None,
        optimizer: torch.optim.Optimizer,
        bounds: Bounds,
    ) -> None:
        self.device = world.device
        self.module = objective.to(world.device)
        self._groups, self._stage, self._grad_clip_norm = groups, zero_stage, grad_clip_norm
        self._named = dict(objective.named_parameters())
        self._shapes = {name: tensor.shape for name, tensor in objective.state_dict().items()}
        self._bounds = bounds
        self._optimizer = optimizer
        with _deepspeed(world) as deepspeed:
            self._engine, zero, _, _ = deepspeed.initialize(
                model=_Autocasting(objective, precision, world.device),
                optimizer=optimizer,
                config=zero_config(zero_stage, grad_clip_norm, world.device),
                dist_init_required=False,
            )
        self._zero: Any = zero if zero_stage > 0 else None
        if self._zero is not None:
            self._create_moments()
            if isinstance(optimizer, LayerwiseOptimizer):
                optimizer.place(self._pieces(), is_shared=True)

    def forward(self, batch: Batch) -> LossDict:
        return self._engine(batch.to(self.device))

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(poisoned_if_not_finite(loss))

    def step(self) -> Tensor:
        norm = self._clip_whole_gradients() if self._stage == 0 else None
        self._engine.step()
        if norm is None:  # infinite if ZeRO found it not finite and skipped the step, on every rank
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32)
        with torch.no_grad():
            for name, (low, high) in self._bounds.items():
                for tensor in self._copies(self._named[name]):
                    tensor.clamp_(low, high)
        return norm

    def set_lrs(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def model_state(self) -> dict[str, Tensor]:
        if self._stage < 3:  # ZeRO has already given every rank the new weights
            return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        state: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            with self._gathered([tensor]):  # one at a time: a rank never holds the whole model on its device
                state[name] = tensor.detach().cpu().clone()
        return state

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        check_names(self._shapes, state)
        with torch.no_grad():
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                value = checked_shape(name, state[name], self._shapes[name]).to(self.device)
                with self._gathered([tensor], is_modified=True):
                    tensor.copy_(value)
                if self._zero is not None and tensor.requires_grad:
                    self._set_piece(tensor, value, None)

    def optimizer_state(self) -> dict[str, Tensor]:
        if self._zero is None:
            return {name: tensor.cpu() for name, tensor in moments_of(self._optimizer, self._groups).items()}
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = {NUM_UPDATES: torch.tensor([int(self._optimizer.state[self._flat_params()[0]]["step"])])}
        for group in self._groups:
            for name, param in zip(group.param_names, group.params, strict=True):
                for moment in MOMENTS:
                    tensors[f"{moment}.{name}"] = safe_get_full_optimizer_state(param, moment).cpu()
        return tensors

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if self._zero is None:
            load_moments(self._optimizer, self._groups, state)
            return
        expected = {f"{moment}.{name}" for group in self._groups for name in group.param_names for moment in MOMENTS}
        if expected | {NUM_UPDATES} != set(state):
            differing = sorted(expected ^ (set(state) - {NUM_UPDATES}))
            raise CheckpointError(
                f"{len(differing)} optimiser states are missing or unknown: {', '.join(differing[:5])}",
                expected="the same model as the one that was saved",
            )
        for group in self._groups:
            for name, param in zip(group.param_names, group.params, strict=True):
                for moment in MOMENTS:
                    key = f"{moment}.{name}"
                    self._set_piece(param, checked_shape(key, state[key], self._shapes[name]).to(self.device), moment)
        for flat in self._flat_params():
            self._optimizer.state[flat]["step"].fill_(float(state[NUM_UPDATES]))

    def _clip_whole_gradients(self) -> Tensor:
        """Without ZeRO gradients are whole: clip and guard them as the replicated engine does."""
        norm = get_total_norm([p.grad for group in self._groups for p in group.params if p.grad is not None])
        optimizer: Any = self._optimizer
        if self._grad_clip_norm is not None:
            optimizer.grad_scale = torch.clamp(norm / self._grad_clip_norm, min=1.0).float()
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        return norm

    def _flat_params(self) -> list[Tensor]:
        """What the optimiser really steps: this rank's piece of each group, flat."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _pieces(self) -> dict[Tensor, list[Piece]]:
        """Which numbers of which parameters this rank's flat pieces are made of."""
        flats = self._flat_params()
        pieces: dict[Tensor, list[Piece]] = {flat: [] for flat in flats}
        for number, group in enumerate(self._groups):
            for name, param in zip(group.param_names, group.params, strict=True):
                if self._stage == 3:
                    index, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
                    start = size * dist.get_rank()
                    numel = min(size, self._shapes[name].numel() - start)  # the last ranks' may hold padding
                    if numel > 0:
                        pieces[flats[index]].append(Piece(name, start, offset, numel))
                elif param._hp_mapping is not None:  # type: ignore[attr-defined]
                    own, flat = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]
                    pieces[flats[number]].append(Piece(name, own.start, flat.start, own.numel))
        return pieces

    def _create_moments(self) -> None:
        """Moments from the start rather than from the first step, so that a resumed run can be put into them."""
        for flat in self._flat_params():
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_piece(self, param: Tensor, value: Tensor, moment: str | None) -> None:
        """Put this rank's piece of a whole value into the master weights, or into a moment."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 3:
            # The function for whole values fails where the size does not divide by the ranks.
            size: int = param.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = value.new_zeros(size * dist.get_world_size())
            padded[: value.numel()] = value.flatten()
            piece = padded[size * dist.get_rank() :][:size]
            if moment is None:
                safe_set_local_fp32_param(param, piece)
            else:
                safe_set_local_optimizer_state(param, piece, moment)
        elif moment is None:
            safe_set_full_fp32_param(param, value)
        else:
            safe_set_full_optimizer_state(param, value, moment)

    def _copies(self, param: Any) -> list[Tensor]:
        """Everything on this rank that holds (a piece of) a parameter's value: weights in use and masters."""
        if self._stage == 0:
            return [param]
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return [param.data, param.ds_tensor.data, safe_get_local_fp32_param(param)]
        mapping = param._hp_mapping  # None where no piece of it is on this rank
        return [param.data, *([] if mapping is None else [mapping.get_hp_fragment()])]

    @contextmanager
    def _gathered(self, tensors: list[Tensor], is_modified: bool = False) -> Iterator[None]:
        """Whole weights within the block; what is written on rank 0 is kept where `is_modified`."""
        if self._stage < 3 or not hasattr(tensors[0], "ds_id"):  # a buffer is whole anyway
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(tensors, modifier_rank=0 if is_modified else None):
            yield


def zero_config(zero_stage: int, grad_clip_norm: float | None, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, made in memory; learning rates and decay come with the optimiser's groups."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # only used for DeepSpeed's own throughput figures
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (grad_clip_norm or 0.0) if zero_stage > 0 else 0.0,  # stage 0 is clipped in `step`
        "steps_per_print": sys.maxsize,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # LAMB is told what its flat pieces are
        "zero_optimization": {"stage": zero_stage, "overlap_comm": device.type == "cuda" and zero_stage > 1},
    }


@contextmanager
def _deepspeed(world: World) -> Iterator[Any]:
    """The package, imported with what it must find in the environment; it logs to stderr, never to stdout.

    Raises: DependencyError if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    with redirect_stdout(sys.stderr):
        try:
            import deepspeed
        except ImportError as error:
            raise DependencyError(
                f'engine.kind = "deepspeed" needs DeepSpeed, which cannot be imported: {error}',
                fix="pip install deepspeed, or set engine.kind to ddp",
            ) from error
        # An empty table of native operators: DeepSpeed would compile its shared-memory all-reduce at start.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
        if not dist.is_initialized():  # one process: DeepSpeed wants a group all the same
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield deepspeed
