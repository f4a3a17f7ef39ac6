"""Weights of a model in eval mode divided over the ranks, for models that do not fit one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from evatool.distributed.engines.blocks import blocks_of
from evatool.distributed.world import World


def shard_weights(
    module: nn.Module, towers: Sequence[nn.Module], tensors: Mapping[str, Tensor], world: World, dtype: torch.dtype
) -> None:
    """Give a module that was built on the meta device its weights, each rank its part of every tower's.

    A tower's blocks come together one at a time in its forward pass, which every rank must run at the same time; other
    ways into a tower than its own call need `call_with_full_weights`. Buffers must have their values already.

    Args:
        towers: submodules that are called; parameters outside of them stay whole, in float32.
        tensors: by parameter name, read one at a time.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    for tower in towers:
        for parameter in tower.parameters():
            parameter.data = parameter.data.to(dtype)
    for part in [*blocks_of(module), *towers]:
        fully_shard(part, mesh=mesh)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=world.device)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in module.named_parameters():
            whole = tensors[name]
            if isinstance(parameter, DTensor):
                _copy_part(parameter, whole, mesh.get_local_rank())
            else:
                parameter.copy_(whole)


def _copy_part(parameter: DTensor, whole: Tensor, rank: int) -> None:
    placement = parameter.placements[0]
    assert isinstance(placement, Shard)
    parts = whole.chunk(parameter.device_mesh.size(), dim=placement.dim)
    local = parameter.to_local()
    if local.numel():
        local.copy_(parts[rank])


def call_with_full_weights(tower: nn.Module, way: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`way` into a divided tower, with its weights brought together as for its own call; once for each tower."""
    tower.call_with_full_weights = way  # type: ignore[assignment]
    register_fsdp_forward_method(tower, "call_with_full_weights")
    return tower.call_with_full_weights  # type: ignore[return-value]


def whole_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state by name, in sorted order, one whole at a time; every rank must go through it."""
    for name, tensor in sorted(module.state_dict().items()):
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
