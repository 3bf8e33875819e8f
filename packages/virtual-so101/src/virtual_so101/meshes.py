"""The printed parts of the SO-101 as light meshes.

The model that ``so101-nexus`` carries draws the arm with 348 thousand triangles: a software renderer manages a
few frames per second with it. Vertex clustering (Rossignac and Borrel, 1993) merges all vertices of one grid
cell into their mean and drops the triangles that collapse; what is left looks the same at 640x480 and draws
an order of magnitude faster.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

__all__ = ["model_path", "simplified_mesh"]

_STL_HEADER_BYTES = 84
_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def model_path() -> Path:
    """The MJCF file of one SO-101, inside the installed ``so101-nexus`` package.

    The package is located and not imported: importing it takes seconds and is not needed for its assets.

    Raises:
        FileNotFoundError: when the package or its model is missing.
    """
    spec = importlib.util.find_spec("so101_nexus")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The SO-101 model comes from the package so101-nexus, which is not installed."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "assets" / "SO101_menagerie" / "so101.xml"
    if not path.is_file():
        raise FileNotFoundError(f"The installed so101-nexus carries no {path.name} under {path.parent}.")
    return path


@functools.lru_cache(maxsize=64)
def simplified_mesh(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Read a binary STL and cluster its vertices on a grid of ``cell`` metres.

    Returns:
        ``(vertices, faces)``: (n, 3) float64 in metres, (m, 3) int32 indices.
    """
    data = path.read_bytes()
    count = int(np.frombuffer(data, "<u4", 1, offset=80)[0])
    corners = np.frombuffer(data, _STL_TRIANGLE, count, offset=_STL_HEADER_BYTES)["corners"].reshape(-1, 3)
    cells = np.floor(corners / cell).astype(np.int64)
    cells -= cells.min(axis=0)
    extent = cells.max(axis=0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    _, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    vertices = np.stack([np.bincount(index, weights=corners[:, axis]) for axis in range(3)], axis=1)
    vertices = vertices / counts[:, None]
    faces = index.reshape(-1, 3)
    alive = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    faces = faces[alive]
    # Many thin slivers fall onto the same three cells: keep each triangle once.
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return vertices, faces[np.sort(first)].astype(np.int32)
