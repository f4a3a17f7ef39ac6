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

from evatool.core.batch import Batch, LossDict
from evatool.core.errors import DependencyError
from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.amp import LossScale, autocast, poisoned_if_not_finite
from evatool.distributed.engines.base import Bounds, Engine
from evatool.distributed.engines.blocks import has_no_weights, materialize
from evatool.distributed.engines.optimizer_state import (
    LayerwiseOptimizer,
    Piece,
    Pieces,
    create_moments,
    load_moments,
    moments_of,
    sharded_moments,
    step_instead,
    whole_pieces,
)
from evatool.distributed.engines.sharded_state import ShardedState, check_names, read_piece
from evatool.distributed.world import World

SUPPORTED_VERSION = "0.19"
"""The DeepSpeed release, without its last number, whose internals this file was written and tested against.

No other file of the package touches them: names with `_hp_mapping`, `ds_` and `zero.` below are not documented there.
"""


class _Autocasting(nn.Module):
    """The objective under autocast; inside the module because DeepSpeed switches off what is entered outside it."""

    def __init__(self, objective: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.objective, self._precision, self._device = objective, precision, device

    def forward(self, batch: Batch, **options: Any) -> LossDict:
        with autocast(self._precision, self._device):
            losses: LossDict = self.objective(batch, **options)
            return losses


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 (nothing divided), 1 (moments), 2 (and gradients) or 3 (and weights)."""

    def __init__(
        self,
        world: World,
        objective: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        zero_stage: int,
        offload: str,
        precision: str,
        grad_clip_norm: float | None,
        optimizer: torch.optim.Optimizer,
        bounds: Bounds,
    ) -> None:
        self.device = world.device
        self.module = objective
        is_empty = has_no_weights(objective)
        self._is_writer = world.is_main
        self._stage, self._grad_clip_norm = zero_stage, grad_clip_norm
        self._scale = LossScale(world.device) if precision == "fp16" else None
        self._shapes = {name: tensor.shape for name, tensor in objective.state_dict().items()}
        self._trained = {name: self._shapes[name] for group in groups for name in group.param_names}
        self._bounds = bounds
        self._optimizer = optimizer
        config = zero_config(zero_stage, grad_clip_norm, world.device, offload)
        with _deepspeed(world) as deepspeed:
            if is_empty and zero_stage == 3:
                _shard_without_weights(deepspeed, objective, config, world.device)
            elif is_empty:
                materialize(objective, world.device)
            else:
                objective.to(world.device)
            self._named = dict(objective.named_parameters())
            if is_empty:
                step_instead(optimizer, groups, self._named)
                if isinstance(optimizer, LayerwiseOptimizer):
                    optimizer.place(whole_pieces(groups), is_shared=False)
            self._engine, zero, _, _ = deepspeed.initialize(
                model=_Autocasting(objective, precision, world.device),
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        self._zero: Any = zero if zero_stage > 0 else None
        self._pieces: Pieces = whole_pieces(groups) if self._zero is None else self._flat_pieces(groups)
        if self._zero is not None:
            create_moments(optimizer, self._pieces)
            if isinstance(optimizer, LayerwiseOptimizer):
                optimizer.place(self._pieces, is_shared=True, is_one_by_one=zero_stage == 3)

    def forward(self, batch: Batch, **options: Any) -> LossDict:
        losses: LossDict = self._engine(batch.to(self.device), **options)
        return losses

    def backward(self, loss: Tensor) -> None:
        loss = poisoned_if_not_finite(loss)
        if self._scale is not None and self._zero is not None:
            self._zero.loss_scale = self._scale.value.item()  # multiplied here and divided out in its step
        elif self._scale is not None:
            loss = loss * self._scale.value.squeeze(0)
        self._engine.backward(loss)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def step(self) -> Tensor:
        norm = self._clip_whole_gradients() if self._zero is None else None
        self._engine.step()
        if norm is None:  # infinite if ZeRO found it not finite and skipped the step, on every rank
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.device)
        if self._scale is not None:
            self._scale.update(~torch.isfinite(norm))
        with torch.no_grad():
            for name, (low, high) in self._bounds.items():
                for tensor in self._copies(self._named[name]):
                    tensor.clamp_(low, high)
        return norm

    def set_lrs(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    @contextmanager
    def summon_full_weights(self) -> Iterator[None]:
        # Whole layers fetch their weights themselves; what stands beside them (class token, positions, temperature)
        # is gathered here.
        beside = {id(p): p for m in self.module.modules() if any(m.children()) for p in m.parameters(recurse=False)}
        with self._full_state(list(beside.values())):
            yield

    def replicated_tensors(self) -> list[Tensor]:
        state = self.module.state_dict(keep_vars=True).values()
        return [tensor.detach() for tensor in state if not self._is_sharded(tensor)]

    def sharded_tensors(self) -> list[Tensor]:
        if self._zero is None:
            return []
        parameters: list[Any] = list(self._named.values())
        weights = [param.ds_tensor.data for param in parameters if self._is_sharded(param)]
        return [*weights, *(flat.detach() for flat in self._pieces), *moments_of(self._optimizer, self._pieces)]

    def sharded_model_state(self) -> ShardedState:
        state = ShardedState()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            state.declare(name, self._shapes[name], torch.float32 if name in self._trained else tensor.dtype)
            if self._zero is not None and name in self._trained:
                continue  # from the masters below
            if self._is_sharded(tensor):
                start, numel = self._own_range(tensor)
                state.add(name, start, tensor.ds_tensor.view(-1)[:numel])
            elif self._is_writer:
                state.add(name, 0, tensor)
        if self._zero is not None:
            for flat, listed in self._pieces.items():
                for piece in listed:
                    state.add(piece.name, piece.start, flat.view(-1).narrow(0, piece.offset, piece.numel))
        return state

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        check_names(self._shapes, state)
        with torch.no_grad():
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                shape = self._shapes[name]
                if self._is_sharded(tensor):
                    start, numel = self._own_range(tensor)
                    if numel > 0:
                        tensor.ds_tensor.view(-1)[:numel].copy_(read_piece(state, name, start, numel, shape))
                if tensor.numel() == shape.numel():  # small weights stay whole under ZeRO-3
                    tensor.view(-1).copy_(read_piece(state, name, 0, shape.numel(), shape))
            if self._zero is not None:
                for flat, listed in self._pieces.items():
                    for piece in listed:
                        values = read_piece(state, piece.name, piece.start, piece.numel, self._shapes[piece.name])
                        flat.view(-1).narrow(0, piece.offset, piece.numel).copy_(values)

    def sharded_optimizer_state(self) -> ShardedState:
        stepped = {flat: listed for flat, listed in self._pieces.items() if self._optimizer.state.get(flat)}
        if self._zero is None:
            shapes = {piece.name: self._trained[piece.name] for listed in stepped.values() for piece in listed}
            state = sharded_moments(self._optimizer, stepped, shapes, is_writer=self._is_writer)
        else:
            state = sharded_moments(self._optimizer, stepped, self._trained, is_writer=True)
        if self._scale is None:
            return state
        return state.merged(ShardedState.whole(self._scale.state(), is_writer=self._is_writer))

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        load_moments(self._optimizer, self._pieces, self._trained, state)
        if self._scale is not None:
            self._scale.load(state)

    def _clip_whole_gradients(self) -> Tensor:
        """Without ZeRO gradients are whole: clip and guard them as the replicated engine does."""
        norm = get_total_norm([tensor.grad for tensor in self._pieces if tensor.grad is not None])
        optimizer: Any = self._optimizer
        divisor = torch.ones((), device=self.device) if self._scale is None else self._scale.value.squeeze(0)
        norm = norm / divisor
        if self._grad_clip_norm is not None:
            divisor = divisor * torch.clamp(norm / self._grad_clip_norm, min=1.0).float()
        optimizer.grad_scale = divisor.float()
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        return norm

    def _flat_params(self) -> list[Tensor]:
        """What the optimiser really steps: this rank's piece of each group, flat."""
        zero = self._zero
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat

    def _flat_pieces(self, groups: Sequence[ParamGroup]) -> dict[Tensor, list[Piece]]:
        """Which numbers of which parameters this rank's flat pieces are made of."""
        flats = self._flat_params()
        pieces: dict[Tensor, list[Piece]] = {flat: [] for flat in flats}
        for number, group in enumerate(groups):
            for name, param in zip(group.param_names, group.params, strict=True):
                if self._stage == 3:
                    index, offset, _ = self._zero.grad_position[self._zero.get_param_id(param)]
                    start, numel = self._own_range(param)
                    if numel > 0:
                        pieces[flats[index]].append(Piece(name, start, offset, numel))
                elif param._hp_mapping is not None:  # type: ignore[attr-defined]
                    own, flat = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]
                    pieces[flats[number]].append(Piece(name, own.start, flat.start, own.numel))
        return pieces

    def _is_sharded(self, tensor: Any) -> bool:
        """True for a parameter that ZeRO-3 has divided over ranks."""
        return self._stage == 3 and hasattr(tensor, "ds_id")

    def _own_range(self, param: Any) -> tuple[int, int]:
        """Start and count of this rank's numbers of a divided parameter; the last ranks' may be padding."""
        size: int = param.ds_tensor.ds_numel
        start = size * dist.get_rank()
        return start, max(0, min(size, param.ds_numel - start))

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
    def _full_state(self, tensors: list[Tensor]) -> Iterator[None]:
        """Whole weights within the block, to read."""
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(tensors):
            yield


def _shard_without_weights(deepspeed: Any, objective: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Divide parameters that are on the meta device over the ranks: memory for one whole tensor at a time."""
    divide = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)
    for module in objective.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for name, param in list(module.named_parameters(recurse=False)):
            if param.is_meta:
                zeros = torch.zeros(param.shape, dtype=param.dtype, device=device)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=param.requires_grad)
                divide._convert_to_zero_parameters([module._parameters[name]])


def zero_config(
    zero_stage: int, grad_clip_norm: float | None, device: torch.device, offload: str = "none"
) -> dict[str, Any]:
    """DeepSpeed's configuration, made in memory; learning rates and decay come with the optimiser's groups."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": device.type == "cuda" and zero_stage > 1}
    in_main_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if offload != "none":
        zero["offload_optimizer"] = in_main_memory
    if offload == "optimizer-and-weights":
        zero["offload_param"] = in_main_memory
    return {
        "train_micro_batch_size_per_gpu": 1,  # only used for DeepSpeed's own throughput figures
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (grad_clip_norm or 0.0) if zero_stage > 0 else 0.0,  # stage 0 is clipped in `step`
        "steps_per_print": sys.maxsize,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # LAMB is told what its flat pieces are
        "zero_optimization": zero,
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
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        yield deepspeed
