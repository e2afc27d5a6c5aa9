"""Rows of one table, spread over the workers of a run by torchrec: asked for and learned together.

The only file that needs the extra `sharded`. Worker r holds the r-th of equal runs of rows, in
memory of fbgemm. What a worker asks for comes from their owners by all-to-all; gradients go back
the same way, are added up per row, divided by the number of workers, and applied by fbgemm's fused
row-wise Adagrad, the formula of `marm.sparse.SparseTable.apply_gradient`. Every method that says so
is a collective call: all workers make it, in the same order.

Shape legend: R rows asked for, S rows held here, F feature dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_TABLE, _FEATURE = "table", "row"


class RowShards:
    """``num_rows`` rows of ``feature_dim`` numbers over all workers of the process group.

    Attributes:
        values_SF: the rows held here, where they are learned; not yet initialised.
        squared_gradient_S: their accumulated mean squares.
        first_row: the first of them.
        rows_per_worker: rows that each worker but the last ones holds.
    """

    def __init__(
        self,
        num_rows: int,
        feature_dim: int,
        learning_rate: float,
        device: torch.device,
        epsilon: float = 1e-8,
    ) -> None:
        world_size = dist.get_world_size()
        self.rows_per_worker = -(-num_rows // world_size)
        self.first_row = dist.get_rank() * self.rows_per_worker
        if (world_size - 1) * self.rows_per_worker >= num_rows:
            raise ValueError(
                f"expected enough rows for each of {world_size} workers, got {num_rows}; raise "
                "num_slots, or use fewer workers or replicated tables"
            )
        self._device = device
        settings = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": learning_rate,
            "eps": epsilon,
        }
        sharder = EmbeddingCollectionSharder(fused_params=settings, use_index_dedup=False)
        module = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=_TABLE,
                    embedding_dim=feature_dim,
                    num_embeddings=num_rows,
                    feature_names=[_FEATURE],
                )
            ],
            device=torch.device("meta"),
        )
        plan = construct_module_sharding_plan(
            module,
            {_TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type=device.type,
        )
        # It draws values of its own, which must not move the generator that initialises models.
        with torch.random.fork_rng():
            self._module = sharder.shard(
                module, plan, ShardingEnv.from_process_group(dist.group.WORLD), device
            )
        (weight,) = self._module.state_dict().values()
        (state,) = self._module.fused_optimizer.state_dict()["state"].values()
        self.values_SF = _local(weight)
        (momentum,) = (_local(value) for name, value in state.items() if "momentum1" in name)
        self.squared_gradient_S = momentum.view(-1)

    def look_up(self, row_R: Tensor) -> Tensor:
        """Values ``[R, F]`` of distinct rows; a collective call. Their backward pass, another one,
        updates the rows of all workers; without it nothing is learned."""
        # fbgemm knows no inference mode: its look-up is an autograd kernel, also without gradients.
        is_learning = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(is_learning):
            # One bag, so that a worker that asks for nothing still asks.
            length = torch.tensor([len(row_R)], dtype=torch.int64, device=self._device)
            rows = row_R.to(self._device, copy=True)
            asked = KeyedJaggedTensor(keys=[_FEATURE], values=rows, lengths=length)
            found: Tensor = self._module(asked)[_FEATURE].values()
        return found


def _local(value: Any) -> Tensor:
    """This worker's part of a sharded tensor, sharing its memory."""
    (shard,) = value.local_shards()
    found: Tensor = shard.tensor
    return found
