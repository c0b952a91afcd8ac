"""gzip chunks read by libdeflate are what HDF5 reads, and what is damaged or unusual is left to HDF5."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from screformer.tokenization import gzip_chunks
from screformer.tokenization.gzip_chunks import GzipChunks, read_by_libdeflate

pytest.importorskip("deflate")
VALUES = np.random.default_rng(0).poisson(3.0, 1000)


def write(path: Path, values: np.ndarray = VALUES, **options) -> h5py.Dataset:
    options = {"chunks": (64,), "compression": "gzip", **options}
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=values, maxshape=(None,), **options)
    return h5py.File(path)["data"]


def damage(path: Path, dataset: h5py.Dataset, chunk: int) -> h5py.Dataset:
    """Write over the middle of a chunk."""
    offset, size = (dataset.id.get_chunk_info(chunk).byte_offset, dataset.id.get_chunk_info(chunk).size)
    dataset.file.close()
    with path.open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"\xff" * 8)
    return h5py.File(path)["data"]


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("dtype", ["<i4", "<f4", ">i4", "<u2", "<i8", ">f8", "i1"])
def test_slices_are_those_of_hdf5(tmp_path: Path, dtype: str, is_shuffled: bool) -> None:
    dataset = write(tmp_path / "a.h5", VALUES.astype(dtype), shuffle=is_shuffled)
    ours = read_by_libdeflate(dataset)
    assert isinstance(ours, GzipChunks)
    assert (ours.dtype, ours.shape, len(ours)) == (dataset.dtype, dataset.shape, 1000)

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 1100), st.integers(0, 1100))
    def check(start: int, stop: int) -> None:
        part = ours[start:stop]
        assert part.dtype == dataset.dtype
        np.testing.assert_array_equal(part, dataset[start:stop])

    check()
    np.testing.assert_array_equal(ours[:], dataset[:])


def test_every_chunk_is_decompressed_by_libdeflate_and_once_in_a_row(tmp_path: Path, monkeypatch) -> None:
    ours = read_by_libdeflate(write(tmp_path / "a.h5"))
    calls = []
    decompress = gzip_chunks.deflate.zlib_decompress
    monkeypatch.setattr(
        gzip_chunks.deflate, "zlib_decompress", lambda *arguments: calls.append(1) or decompress(*arguments)
    )
    # HDF5's own reading would not pass here.
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    parts = [ours[start : start + 10] for start in range(0, 1000, 10)]
    np.testing.assert_array_equal(np.concatenate(parts), VALUES)
    assert len(calls) == 16


def test_a_chunk_that_the_writer_left_uncompressed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path).file.close()
    plain = np.arange(64)
    with h5py.File(path, "r+") as file:
        file["data"].id.write_direct_chunk((128,), plain.astype(VALUES.dtype).tobytes(), filter_mask=1)
    ours = read_by_libdeflate(h5py.File(path)["data"])
    np.testing.assert_array_equal(ours[128:192], plain)
    np.testing.assert_array_equal(ours[64:128], VALUES[64:128])


def test_a_chunk_that_was_never_written_has_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("data", (200,), "i4", chunks=(64,), compression="gzip", fillvalue=7)
        dataset[:64] = 1
    ours = read_by_libdeflate(h5py.File(tmp_path / "a.h5")["data"])
    np.testing.assert_array_equal(ours[60:70], [1] * 4 + [7] * 6)


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_damaged_chunk_gives_the_error_of_hdf5_and_spares_the_others(tmp_path: Path, is_shuffled: bool) -> None:
    path = tmp_path / "a.h5"
    dataset = damage(path, write(path, shuffle=is_shuffled), 3)
    ours = read_by_libdeflate(dataset)
    with pytest.raises(OSError, match="Can't") as by_hdf5:
        dataset[3 * 64 : 4 * 64]
    with pytest.raises(OSError, match="Can't") as by_us:
        ours[3 * 64 : 4 * 64]
    assert str(by_us.value) == str(by_hdf5.value)
    np.testing.assert_array_equal(ours[: 3 * 64], VALUES[: 3 * 64])


def test_a_large_chunk_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gzip_chunks, "MAX_KEPT_BYTES", 100)
    ours = read_by_libdeflate(write(tmp_path / "a.h5"))
    np.testing.assert_array_equal(ours[5:500], VALUES[5:500])
    assert ours._kept is None


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzf"},
        {"compression": None},
        {"compression": None, "chunks": None, "maxshape": None},
        {"fletcher32": True},
        {"scaleoffset": 0},
    ],
)
def test_other_filters_are_left_to_hdf5(tmp_path: Path, options: dict) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=VALUES, **{"chunks": (64,), "compression": "gzip", **options})
    dataset = h5py.File(tmp_path / "a.h5")["data"]
    assert read_by_libdeflate(dataset) is dataset


def test_text_tables_and_arrays_are_left_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=[b"one", b"two"], chunks=(1,), compression="gzip")
        file.create_dataset("table", data=np.ones((4, 4)), chunks=(2, 2), compression="gzip")
    file = h5py.File(tmp_path / "a.h5")
    for array in (file["text"], file["table"], VALUES):
        assert read_by_libdeflate(array) is array


def test_without_libdeflate_hdf5_reads(tmp_path: Path, monkeypatch) -> None:
    dataset = write(tmp_path / "a.h5")
    monkeypatch.setattr(gzip_chunks, "deflate", None)
    assert read_by_libdeflate(dataset) is dataset
