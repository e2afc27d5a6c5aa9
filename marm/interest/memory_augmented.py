"""MARM: multi-layer target attention over cached outputs (Eq. 5 and 6); L = 0 is a single layer.

Plain, or with SIM (Section 2.2, Eq. 9): then each layer attends to the rows its search finds.
"""

from __future__ import annotations

from torch import Tensor

from marm.amortised import AmortisedAttention, UserHistory
from marm.attention import MultiLayerTargetAttention
from marm.config import ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.precision import build_precision
from marm.scoring_plan import ScoringPlan
from marm.search import AllRows, Found, RowSearch


class MemoryAugmented(Interest):
    """The only method that reads cached vectors and computes those to save.

    ``search`` says which rows a layer attends to, in training as in serving.
    """

    def __init__(self, config: ModelConfig, search: RowSearch) -> None:
        super().__init__()
        self.attention = MultiLayerTargetAttention(
            config.feature_dim,
            config.feature_dim,
            config.attention_dim,
            config.namespace.dim,
            config.depth - config.error_layers,
            config.num_heads,
            config.recency,
            search,
        )
        self._dim = config.attention_dim
        self._first_layer = config.error_layers  # in the memory; below are accumulated errors
        self._amortised: AmortisedAttention | None = None

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def freeze(self, plan: ScoringPlan) -> None:
        """See `Interest.freeze`: all candidates of a request pass the attention at once
        (`marm.amortised`)."""
        device = self.attention.first.query.weight.device
        self._amortised = AmortisedAttention(
            self.attention, build_precision(plan.precision, device), plan.search
        )

    def unfreeze(self) -> None:
        """See `Interest.unfreeze`."""
        self._amortised = None

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`; ``rows`` are y_1..y_L."""
        if self._amortised is not None and history.request is not None:
            outputs = self._amortised.outputs(query_BF, self._rows_of_request(history))
        else:
            cached = history.block_memory_BLD
            outputs = self.attention(
                query_BF,
                history.slab,
                history.memory_UNLD[:, :, self._first_layer :],
                history.memorised_BN,
                history.block,
                None if cached is None else cached[:, self._first_layer :],
            )
        return InterestOutput(outputs[-1], outputs[:-1])

    def search_rows(self, query_BF: Tensor, history: History) -> list[Found]:
        """What the search of each layer finds for one user's candidates, as positions among the
        slab's rows.

        Raises:
            ValueError: when the model is not frozen with a search.
        """
        if self._amortised is None or isinstance(self._amortised.search, AllRows):
            raise ValueError(
                "the model attends to all rows; freeze it with a search, such as "
                "ScoringPlan(search=TopRows(100)), and ask again"
            )
        found: list[Found] = []
        self._amortised.outputs(query_BF, self._rows_of_request(history), found)
        return found

    def _rows_of_request(self, history: History) -> UserHistory:
        """The rows of a request's only user, as all of its candidates see them."""
        slab = history.slab
        return UserHistory(
            slab.features[0],
            history.memory_UNLD[0, :, self._first_layer :],
            slab.visible[0],
            history.memorised_BN[0],
            slab.distance[0],
            slab.gap[0],
            history.request,
        )
