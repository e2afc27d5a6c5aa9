"""What workers exchange in a step, with one worker as the trivial case."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.messages import decode_message, encode_message


class Collective(Protocol):
    """The exchange between the workers of a run."""

    @property
    def rank(self) -> int:
        """This worker."""
        ...

    @property
    def world_size(self) -> int:
        """Number of workers."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over workers."""
        ...

    def concat(self, rows: Tensor) -> Tensor:
        """Rows of all workers one after the other; their numbers may differ."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A small value of every worker, by rank; see `train.messages` for what it may hold."""
        ...

    def wrap(self, net: nn.Module) -> nn.Module:
        """``net`` with gradients averaged over workers."""
        ...


class SingleWorker:
    """One worker: nothing to exchange."""

    rank = 0
    world_size = 1

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def concat(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def wrap(self, net: nn.Module) -> nn.Module:
        """The net itself."""
        return net


class DistributedWorkers:
    """Workers of an initialised `torch.distributed` process group (gloo or NCCL)."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def sum(self, values: Tensor) -> Tensor:
        """See `Collective.sum`."""
        total = values.to(self._device)
        dist.all_reduce(total)
        return total

    def concat(self, rows: Tensor) -> Tensor:
        """See `Collective.concat`."""
        return torch.cat(self._rows_of_all(rows))

    def gather(self, value: Any) -> list[Any]:
        """See `Collective.gather`."""
        sent = torch.frombuffer(bytearray(encode_message(value)), dtype=torch.uint8)
        parts = self._rows_of_all(sent.to(self._device))
        return [decode_message(part.cpu().numpy().tobytes()) for part in parts]

    def _rows_of_all(self, rows: Tensor) -> list[Tensor]:
        """Rows of every worker, by rank; their numbers may differ."""
        rows = rows.contiguous()
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self._device)
        sizes[self.rank] = len(rows)
        dist.all_reduce(sizes)
        counts = sizes.tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def wrap(self, net: nn.Module) -> nn.Module:
        """See `Collective.wrap`."""
        return nn.parallel.DistributedDataParallel(net)
