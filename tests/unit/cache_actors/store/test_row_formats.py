"""Rows at rest: layouts, what is copied and what is not, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_actors.store.row_formats import as_read, decode, decode_into, encode
from marm.memory import ROW_DTYPES, Namespace

SHAPES = [(0, 3), (1, 1), (1, 3), (2, 32), (4, 64)]


def random_rows(namespace: Namespace, count: int = 9, seed: int = 0) -> NDArray[np.void]:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, namespace.row_dtype)
    for field in namespace.row_dtype.names or ():
        if field != "memory":
            rows[field] = rng.integers(0, 2**31, count)
    rows["memory"] = rng.normal(size=rows["memory"].shape)
    return rows


def same_event(rows: NDArray[np.void], others: NDArray[np.void]) -> bool:
    names = [name for name in rows.dtype.names or () if name != "memory"]
    return all(np.array_equal(rows[name], others[name]) for name in names)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("depth", "dim"), SHAPES)
def test_floats_come_back_bit_by_bit(dtype: str, depth: int, dim: int) -> None:
    namespace = Namespace(depth=depth, dim=dim, dtype=dtype)
    rows = random_rows(namespace)
    stored = encode(namespace, rows)
    assert stored.dtype == namespace.stored_dtype
    assert decode(namespace, stored).tobytes() == rows.tobytes()
    assert as_read(namespace, rows) is rows


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equal_layouts_are_not_copied(dtype: str) -> None:
    namespace = Namespace(depth=2, dim=32, dtype=dtype)
    rows = random_rows(namespace)
    assert encode(namespace, rows) is rows
    assert decode(namespace, rows) is rows
    assert decode(namespace, rows, layers=2) is rows


def test_padding_is_zero_so_that_equal_rows_have_equal_bytes() -> None:
    namespace = Namespace(depth=1, dim=3, dtype="float16")
    rows = random_rows(namespace)
    assert not encode(namespace, rows)["pad"].any()
    assert encode(namespace, rows).tobytes() == encode(namespace, rows.copy()).tobytes()


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize(("depth", "dim"), SHAPES)
def test_every_selection_of_layers_is_the_beginning_of_all_of_them(
    dtype: str, depth: int, dim: int
) -> None:
    namespace = Namespace(depth=depth, dim=dim, dtype=dtype)
    rows = random_rows(namespace)
    stored = encode(namespace, rows)
    everything = decode(namespace, stored)
    assert same_event(everything, rows)
    for layers in range(depth + 1):
        part = decode(namespace, stored, layers)
        assert part.dtype == namespace.layers_dtype(layers)
        assert same_event(part, rows)
        np.testing.assert_array_equal(part["memory"], everything["memory"][:, :layers])


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_between_which_a_store_keeps_something_of_its_own(dtype: str) -> None:
    namespace = Namespace(depth=2, dim=5, dtype=dtype)
    rows = random_rows(namespace)
    stored = encode(namespace, rows)
    spaced = np.full(len(rows), 7, [("row", namespace.stored_dtype), ("check", np.uint64)])
    spaced["row"] = stored
    spaced.setflags(write=False)
    for layers in (0, 1, 2):
        out = np.full(len(rows) * 2, 7, namespace.layers_dtype(layers))
        decode_into(namespace, spaced["row"], out[::2])
        assert out[::2].tobytes() == decode(namespace, stored, layers).tobytes()
        assert (out["item_id"][1::2] == 7).all()


def test_int8_bytes_by_hand() -> None:
    namespace = Namespace(depth=2, dim=2, dtype="int8")
    rows = random_rows(namespace, 1)
    rows["memory"] = [[[127.0, -1.0], [0.0, 0.0]]]
    stored = encode(namespace, rows)
    assert stored["scale"].tolist() == [[1.0, 0.0]]
    assert stored["memory"].tolist() == [[[127, -1], [0, 0]]]
    assert decode(namespace, stored)["memory"].tolist() == [[[127.0, -1.0], [0.0, 0.0]]]


def test_the_scale_is_per_layer() -> None:
    namespace = Namespace(depth=2, dim=64, dtype="int8")
    rows = random_rows(namespace)
    rows["memory"][:, 1] *= 1000
    error = np.abs(as_read(namespace, rows)["memory"].astype(float) - rows["memory"])
    assert error[:, 0].max() < 0.02 < error[:, 1].max() < 20


def test_no_rows() -> None:
    for dtype in ROW_DTYPES:
        namespace = Namespace(depth=2, dim=3, dtype=dtype)
        nothing = np.empty(0, namespace.row_dtype)
        assert decode(namespace, encode(namespace, nothing)).shape == (0,)


class TestRefused:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_numbers_that_have_no_scale(self, value: float) -> None:
        namespace = Namespace(depth=2, dim=3, dtype="int8")
        rows = random_rows(namespace)
        rows["memory"][4, 1, 2] = value
        with pytest.raises(ValueError, match=r"must be finite.*layer 1 of row 4"):
            encode(namespace, rows)

    @pytest.mark.parametrize("dtype", ROW_DTYPES)
    def test_rows_of_another_namespace(self, dtype: str) -> None:
        namespace = Namespace(depth=2, dim=8, dtype=dtype)
        other = random_rows(Namespace(depth=2, dim=7, dtype=dtype))
        with pytest.raises(ValueError, match=rf"rows to store to be of {namespace.name}.*got"):
            encode(namespace, other)
        with pytest.raises(ValueError, match=rf"stored rows to be of {namespace.name}.*got"):
            decode(namespace, other)

    def test_layers_that_are_not_there(self) -> None:
        namespace = Namespace(depth=2)
        with pytest.raises(ValueError, match=r"between 0 and the depth 2.*got 3"):
            decode(namespace, encode(namespace, random_rows(namespace)), layers=3)

    def test_room_of_another_shape(self) -> None:
        namespace = Namespace(depth=2, dim=8)
        stored = encode(namespace, random_rows(namespace, 5))
        with pytest.raises(ValueError, match="room for 5 rows, got room for 4"):
            decode_into(namespace, stored, np.empty(4, namespace.row_dtype))
        with pytest.raises(ValueError, match="rows to read into"):
            decode_into(namespace, stored, np.empty(5, Namespace(depth=2, dim=7).row_dtype))
        with pytest.raises(ValueError, match="to read into, got float32"):
            decode_into(namespace, stored, np.empty(5, np.float32))
