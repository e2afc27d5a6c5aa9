"""``marm memory convert``: a namespace's rows in another number format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from app.cli.memory.namespaces import check_convertible
from app.cli.memory.pools import DEFAULT_POOL, PoolOption, opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import progress_bar, to_json
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from cache_actors.transfer.convert import Converted, convert_buckets
from cache_actors.transfer.pool_memory import PoolMemory
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows


def convert_command(
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or int8.")],
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", help="Name as in `status`; needed if there are several."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Copy a namespace's rows into one of another dtype, while both are in use; prints counts.

    Only what the target lacks is written, so it may be broken off and repeated.
    """
    with opened_pool(Home(home), pool, address) as memory, progress_bar() as bars:
        source = chosen_namespace(memory.namespaces(), namespace)
        target = replace(source, dtype=dtype)
        if target == source:
            raise ValueError(f"{source.name} has dtype {dtype} already; choose another")
        check_convertible(ModelRegistry(Home(home).models), source, target)
        task = bars.add_task("converting buckets", total=NUM_BUCKETS, note="")
        total = Converted()
        for done in convert_buckets(_Source(memory, source), memory.client(target)):
            total += done
            bars.update(task, completed=total.buckets, note=f"{total.rows_written:,} rows written")
    typer.echo(to_json({"source": source.name, "target": target.name, **asdict(total)}))


def chosen_namespace(found: list[Namespace], name: str | None) -> Namespace:
    """The namespace of that name, or the only one."""
    names = [namespace.name for namespace in found]
    if name is None and len(found) == 1:
        return found[0]
    if name not in names:
        raise ValueError(f"--namespace must be one of {names}, got {name!r}")
    return found[names.index(name)]


@dataclass(frozen=True)
class _Source:
    """One namespace of a pool, to be read bucket by bucket."""

    memory: PoolMemory
    namespace: Namespace

    def scan(self, bucket: int) -> Iterator[UserRows]:
        """See `marm.memory.ScannableMemory`."""
        return self.memory.scan(self.namespace, bucket)
