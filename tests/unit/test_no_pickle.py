"""No code of the project unpickles: what is read from files or the network may be wrong, but must
not be able to run. Ray pickles between its own processes, which is why its token authentication is
switched on wherever other machines can reach it (docs/serving/security.md)."""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from train.data.fragments import Fragment, IngestError, read_parquet

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("marm", "cache_actors", "train", "stages", "app", "benchmarks")

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that turn bytes into code or objects."""

CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "ray.cloudpickle",
    "dist.all_gather_object",
    "dist.broadcast_object_list",
    "dist.gather_object",
    "dist.scatter_object_list",
    "dist.send_object_list",
    "dist.recv_object_list",
    "pa.deserialize",
    "pa.PyExtensionType",
    "np.fromregex",
}
"""Calls that may unpickle or run what they are given."""

NUMPY_LOADERS = {"np.load", "numpy.load", "np.savez", "np.savez_compressed", "np.save"}
"""Calls that are safe with ``allow_pickle=False``, which has to be written out."""


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def findings(source: str) -> list[str]:
    """What in ``source`` could unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if set(alias.name.split(".")) & MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            found += sorted(names & MODULES)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            plain = {
                word.arg: word.value.value
                for word in node.keywords
                if isinstance(word.value, ast.Constant)
            }
            if name in CALLS or set(name.split(".")) & MODULES:
                found.append(name)
            if name in NUMPY_LOADERS and plain.get("allow_pickle") is not False:
                found.append(f"{name} without allow_pickle=False")
            if name not in NUMPY_LOADERS and plain.get("allow_pickle"):
                found.append(f"{name} with allow_pickle")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_code_unpickles(package: str) -> None:
    found = {
        str(path.relative_to(REPO)): what
        for path in sorted((REPO / package).rglob("*.py"))
        if (what := findings(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as cp",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "eval(text)",
        "dist.all_gather_object(values, value)",
        "reader(path, allow_pickle=True)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source", ["np.load(path, allow_pickle=False)", "yaml.safe_load(text)", "model.eval()"]
)
def test_the_search_leaves_alone(source: str) -> None:
    assert findings(source) == []


class Trap:
    """Says so when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return spring, ()


def spring() -> str:
    Trap.sprung = True
    return "sprung"


def test_a_file_with_pickled_values_is_refused_unread(tmp_path: Path) -> None:
    assert ray.data is not None  # registers the extension type
    buffer = io.BytesIO()
    pickle.dump(Trap(), buffer)
    storage = pa.array([buffer.getvalue()] * 3, pa.large_binary())
    column = pa.ExtensionArray.from_storage(ArrowPythonObjectArray.from_objects([1]).type, storage)
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({"user_id": pa.array([1, 2, 3]), "tag": column}), path)
    fragment = Fragment(str(path), 0, 1, 0, 0)
    with pytest.raises(IngestError, match="column 'tag' has the extension type"):
        read_parquet(fragment, ["user_id", "tag"])
    assert read_parquet(fragment, ["user_id"]).table.num_rows == 3
    assert not Trap.sprung
