"""How a global batch is shared out over ranks. No torch."""

from __future__ import annotations

from evatool.core.errors import RecipeError


def samples_per_rank(global_batch_size: int, world_size: int) -> int:
    """Samples of one step on each rank. Raises: RecipeError, naming the nearest batch sizes that divide."""
    problem = undivided_batch(global_batch_size, world_size)
    if problem is not None:
        what, expected = problem
        raise RecipeError(what, expected=expected)
    return global_batch_size // world_size


def undivided_batch(global_batch_size: int, world_size: int) -> tuple[str, str] | None:
    """What is wrong where a batch does not divide over the ranks, and what would be right; None where it divides."""
    each, rest = divmod(global_batch_size, world_size)
    if not rest:
        return None
    near = [n for n in (each * world_size, (each + 1) * world_size) if n]
    return (
        f"train.global_batch_size = {global_batch_size} does not divide over {world_size} ranks",
        "nearest that do: " + ", ".join(map(str, near)),
    )
