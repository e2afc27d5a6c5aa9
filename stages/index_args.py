"""Settings of the item index of a retrieval variant. Unknown keys are refused.

Written as the name of a kind (``index: exact``) or as a section::

    index: {kind: ivf, nlist: 1024, min_recall: 0.95}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from stages.item_index import MAX_FOUND

INDEX_KINDS = ("exact", "hnsw", "ivf")


class IndexSettings(BaseModel):
    """Settings of any kind of index."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ExactIndexArgs(IndexSettings):
    """Every item is compared. The right choice up to several 100,000 items."""

    kind: Literal["exact"] = "exact"


class ApproximateIndexArgs(IndexSettings):
    """What both approximate kinds have in common: how good the answers must be.

    The recall is measured whenever a version is loaded, on queries made of its own item vectors,
    and a version whose index stays below ``min_recall`` is refused.
    """

    min_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    recall_k: Annotated[int, Field(ge=1, le=MAX_FOUND)] = 1000
    """How many of the best items the recall is about, such as the stage's ``candidates``."""


class IvfIndexArgs(ApproximateIndexArgs):
    """Items in ``nlist`` clusters, of which a search looks at the ``nprobe`` nearest."""

    kind: Literal["ivf"] = "ivf"
    nlist: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Clusters; the square root of the number of items when not given. With few items fewer."""
    nprobe: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """When not given the smallest power of two that reaches ``min_recall``."""

    @property
    def effort(self) -> int | None:
        """The configured effort of a search; None: to be found."""
        return self.nprobe

    @model_validator(mode="after")
    def _no_more_probes_than_lists(self) -> IvfIndexArgs:
        if self.nlist is not None and self.nprobe is not None and self.nprobe > self.nlist:
            raise ValueError(
                f"nprobe must be at most nlist={self.nlist}, got {self.nprobe}; lower it"
            )
        return self


class HnswIndexArgs(ApproximateIndexArgs):
    """A graph with about ``M`` neighbours per item; slow to build, fast to search."""

    kind: Literal["hnsw"] = "hnsw"
    M: Annotated[int, Field(ge=4, le=128)] = 16
    ef_construction: Annotated[int, Field(ge=8, le=1000)] = 64
    """Candidates looked at for every item while building."""
    ef_search: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Candidates looked at by a search, never fewer than it is to find. When not given the smallest
    power of two that reaches ``min_recall``."""

    @property
    def effort(self) -> int | None:
        """The configured effort of a search; None: to be found."""
        return self.ef_search


def _section(value: Any) -> Any:
    """A kind's name as its section; refuses what names no known kind."""
    if isinstance(value, IndexSettings):
        return value
    section = {"kind": value} if isinstance(value, str) else value
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind not in INDEX_KINDS:
        raise ValueError(
            f"the kind of an item index must be one of {list(INDEX_KINDS)}, got {kind!r}; write "
            "`index: exact` or `index: {kind: ivf, ...}`"
        )
    return section


IndexArgs = Annotated[
    Annotated[ExactIndexArgs | IvfIndexArgs | HnswIndexArgs, Field(discriminator="kind")],
    BeforeValidator(_section),
]
"""Settings of one of the kinds."""

_ADAPTER: TypeAdapter[ExactIndexArgs | IvfIndexArgs | HnswIndexArgs] = TypeAdapter(IndexArgs)


def parse_index_args(value: Any) -> ExactIndexArgs | IvfIndexArgs | HnswIndexArgs:
    """Settings from a kind's name, a section or settings.

    Raises:
        ValueError: saying what was expected.
    """
    return _ADAPTER.validate_python(value)
