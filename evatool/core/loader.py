"""What the trainer needs of a data loader. No torch at run time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from evatool.core.batch import Batch


class Loader(ABC):
    """One rank's batches, without end, in an order that follows from one integer.

    Attributes:
        position: samples of the whole job that are consumed. `__iter__` starts there, so that setting it moves the
            loader: a resumed run goes on from its checkpoint's `position`, which each batch carries.
    """

    position: int

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches from `position` on; ending the iterator ends whatever produces them."""

    def counts(self) -> Mapping[str, float]:
        """Counters of this rank since the start of the run, such as bad samples by cause; summed over ranks for logs.

        Every rank's counters must have the same meaning; a loader that counts nothing returns none.
        """
        return {}


class BatchList(Loader):
    """A list of batches as a loader: from the first to the last, and over again.

    Args:
        batches: this rank's batches, all of one size; their `position` is set here.
        global_batch_size: samples of one batch over all ranks, by which the position moves on.
    """

    def __init__(self, batches: Sequence[Batch], global_batch_size: int, position: int = 0) -> None:
        assert batches, "a list without batches"
        self.position, self._batches, self._global_batch_size = position, batches, global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._batches[self.position // self._global_batch_size % len(self._batches)]
            self.position += self._global_batch_size
            yield batch.at_position(self.position)
