"""Which format a file or folder of cells has, told by its content."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import h5py

from screformer.tokenization.anndata_file import AnnDataFile, open_zarr
from screformer.tokenization.cell_file import CellFile, reading
from screformer.tokenization.loom_file import LoomFile
from screformer.tokenization.soma_experiment import CENSUS_SCHEME, open_census, open_soma
from screformer.tokenization.tenx_file import TenxFolder, TenxH5File, find_tenx_files

FORMATS = (
    "h5ad; AnnData in zarr; 10x .h5, or a folder with matrix.mtx, features.tsv and barcodes.tsv; loom; a TileDB-SOMA "
    "experiment; census://VERSION/ORGANISM"
)
ZARR_FILES = ("zarr.json", ".zgroup", ".zmetadata")
SOMA_FILES = ("__group", "__tiledb_group.tdb")
# Files that begin like this are of a known kind, with a known remedy.
SIGNATURES = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first (gunzip)",
    b"PK": "is a zip archive; unpack it first",
    b"BZh": "is compressed with bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard; unpack it first",
    b"RDX": "is R data; write its counts as matrix.mtx (DropletUtils::write10xCounts) or h5ad (zellkonverter)",
}


def open_cell_file(path: str | Path, *, shared_rows: str | None = None) -> CellFile:
    """Open a file or folder of cells of any format.

    Parameters
    ----------
    path
        A file, a folder or an address.
    shared_rows
        Folder of rows that another process keeps of it (see `CountMatrix.source`).

    Raises
    ------
    FileNotFoundError, PermissionError
        It is not there, or may not be read.
    ImportError
        Its format needs a package that is not installed.
    ValueError
        It is of no known format, or damaged.
    """
    address = str(path)
    if address.startswith(f"{CENSUS_SCHEME}:"):
        return open_census(address)
    if "://" in address:
        return open_soma(address, address.rstrip("/").rpartition("/")[2])
    path = Path(path)
    _check_readable(path)
    if path.is_dir():
        return _open_folder(path, shared_rows)
    tenx = find_tenx_files(path)
    if tenx is not None:
        return TenxFolder(tenx, path.name, shared_rows=shared_rows)
    return _open_hdf5(path)


def _check_readable(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            msg = f"path: {path} is a symbolic link that leads back to itself; name the file itself"
            raise ValueError(msg) from error
        if isinstance(error, PermissionError):
            raise _no_permission(path) from error
        what = "the link leads nowhere" if path.is_symlink() else "there is no file or folder"
        msg = f"path: there is no file {path} ({what})" if path.is_symlink() else f"path: there is no file {path}"
        raise FileNotFoundError(msg) from error
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise _no_permission(path)
    if not path.is_dir() and not path.is_file():
        msg = f"path: {path} is neither a file nor a folder but a device or pipe; write it to a file first"
        raise ValueError(msg)


def _no_permission(path: Path) -> PermissionError:
    return PermissionError(f"path: {path} may not be read by this user; ask its owner, or `chmod u+r` it")


def _open_folder(path: Path, shared_rows: str | None) -> CellFile:
    names = sorted(one.name for one in path.iterdir())
    if any(name in names for name in ZARR_FILES):
        with reading(path.name, "zarr"):
            root = open_zarr(path)
            return AnnDataFile(root, path.name, file_format="zarr")
    if any(name in names for name in SOMA_FILES):
        return open_soma(str(path), path.name)
    tenx = find_tenx_files(path)
    if tenx is not None:
        return TenxFolder(tenx, path.name, shared_rows=shared_rows)
    shown = names[:10] + (["..."] if len(names) > 10 else [])
    msg = f"path: the folder {path} holds none of the formats that can be read ({FORMATS}); it has {shown}"
    raise ValueError(msg)


def _open_hdf5(path: Path) -> CellFile:
    with path.open("rb") as stream:
        beginning = stream.read(8)
    if beginning != b"\x89HDF\r\n\x1a\n" and not h5py.is_hdf5(path):
        raise ValueError(_what_it_is(path, beginning))
    with reading(path.name, "the file"):
        file = h5py.File(path, "r")
    try:
        with reading(path.name, "the file"):
            elsewhere = find_elsewhere(file)
        if elsewhere is not None:
            msg = (
                f"path: {path.name} takes {elsewhere} from another file, which is not read for it; write one file with "
                "everything in it: anndata.read_h5ad(path).write_h5ad(new_path)"
            )
            raise ValueError(msg)
        with reading(path.name, "the file"):
            return _recognise(file)(file, path.name)
    except BaseException:
        file.close()
        raise


def find_elsewhere(group: h5py.Group, *, seen: set[object] | None = None) -> str | None:
    """Return the first element whose values are in another file: linked, stored there, or put together of others.

    A file that came from elsewhere could so show what else this process can read.
    """
    seen = set() if seen is None else seen
    for name in group:
        link = group.get(name, getlink=True)
        path = f"{group.name.rstrip('/')}/{name}"
        if isinstance(link, h5py.ExternalLink):
            return path
        if not isinstance(link, h5py.HardLink):
            continue  # within the file, where what it leads to is looked at
        element = group[name]
        if isinstance(element, h5py.Dataset) and (element.external or element.is_virtual):
            return path
        if isinstance(element, h5py.Group) and element.id not in seen:
            seen.add(element.id)
            found = find_elsewhere(element, seen=seen)
            if found is not None:
                return found
    return None


def _recognise(file: h5py.File) -> Callable[[h5py.File, str], CellFile]:
    keys = set(file)
    if "mod" in keys:
        msg = (
            f"path: {Path(file.filename).name} is MuData, with the modalities {sorted(file['mod'])}; write the one of "
            "gene expression: mudata.read(path)['rna'].write_h5ad(new_path)"
        )
        raise ValueError(msg)
    if {"obs", "var"} <= keys:
        return lambda root, name: AnnDataFile(root, name, file_format="h5ad")
    if {"matrix", "row_attrs"} <= keys and isinstance(file["matrix"], h5py.Dataset):
        return LoomFile
    if any(isinstance(file[key], h5py.Group) and "barcodes" in file[key] for key in keys):
        return TenxH5File
    msg = (
        f"path: {Path(file.filename).name} is HDF5 but not h5ad (it has {sorted(keys)}, obs and var are needed), nor "
        "loom, nor as Cell Ranger writes it"
    )
    raise ValueError(msg)


def _what_it_is(path: Path, beginning: bytes) -> str:
    if not beginning:
        return f"path: {path.name} is an empty file; copy or download it again"
    for signature, what in SIGNATURES.items():
        if beginning.startswith(signature):
            return f"path: {path.name} {what}"
    return f"path: {path.name} is not an h5ad file, nor one of the other formats that can be read ({FORMATS})"
