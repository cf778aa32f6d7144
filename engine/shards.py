"""One shard: an array of hidden states as the bytes of one Zarr v3 sharded object, and back to a digest.

The layout is that of Zarr's `sharding_indexed` codec: encoded inner chunks, then the index of their (offset, length),
then crc32c. Written by hand because zarr-python encodes a shard in one thread and hands over pieces (2.20 against
1.33 GB/s uncompressed). This module knows nothing about files or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import google_crc32c
import numpy as np
import xxhash
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

CODECS = ("lz4", "zstd", "none")
"""lz4: bitshuffle + LZ4, as fast as the disk. zstd: bitshuffle + Zstandard, smaller and slower. none: crc32c only."""


def zarr_compressors(codec: str, item_size: int) -> list[Any]:
    """Return the bytes-to-bytes codecs of the inner chunks for zarr's metadata."""
    if codec == "none":
        return [Crc32cCodec()]
    name, level = _blosc_settings(codec)
    return [BloscCodec(typesize=item_size, cname=name, clevel=level, shuffle="bitshuffle"), Crc32cCodec()]


def _blosc_settings(codec: str) -> tuple[Any, int]:
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    return ("lz4", 5) if codec == "lz4" else ("zstd", 3)


def encode_shard(chunks: np.ndarray[Any, Any], codec: str, executor: Executor) -> list[bytes]:
    """Encode [L, S, P, D], L inner chunks of shape (S, 1, P, D), little endian. Returns the object in pieces.

    The chunks are encoded in the executor's threads; Blosc lets go of the interpreter's lock. A chunk and its checksum
    are two pieces, so that nothing is copied to join them.
    """
    assert chunks.flags.c_contiguous and chunks.dtype.newbyteorder("<") == chunks.dtype
    if codec == "none":
        encoded: Iterable[bytes] = (chunk.tobytes() for chunk in chunks)
    else:
        name, level = _blosc_settings(codec)
        blosc = Blosc(cname=name, clevel=level, shuffle=Blosc.BITSHUFFLE)
        encoded = executor.map(blosc.encode, chunks)
    pieces = [piece for data in encoded for piece in (data, _crc(data))]
    lengths = np.asarray([len(data) + 4 for data in pieces[::2]], "<u8")
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<u8")
    index = np.stack([offsets, lengths], axis=1).tobytes()
    return [*pieces, index, _crc(index)]


def index_size(n_chunks: int) -> int:
    """Return the bytes of a shard's index, which stands at its end."""
    return 16 * n_chunks + 4


def find_chunk(index: bytes, chunk: int) -> tuple[int, int]:
    """Return (offset, size) of an inner chunk within its shard. Raises ValueError if the index is damaged."""
    offsets_and_sizes = np.frombuffer(_without_crc(index), "<u8").reshape(-1, 2)
    offset, size = offsets_and_sizes[chunk]
    return int(offset), int(size)


def decode_chunk(data: bytes, codec: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return the flat array that an inner chunk was encoded from. Raises ValueError if its checksum is wrong."""
    encoded = _without_crc(data)
    decoded = encoded if codec == "none" else Blosc().decode(encoded)
    return np.frombuffer(decoded, dtype)


def _without_crc(data: bytes) -> bytes:
    content = data[:-4]
    if _crc(content) != data[-4:]:
        raise ValueError("a checksum does not match")
    return content


def _crc(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return checksum.to_bytes(4, "little")


def damaged_chunks(data: bytes, n_chunks: int) -> list[int]:
    """Return the inner chunks of a whole shard whose checksum is wrong. Raises ValueError if its index is damaged."""
    index = data[-index_size(n_chunks) :]
    damaged = []
    for chunk in range(n_chunks):
        offset, size = find_chunk(index, chunk)
        try:
            _without_crc(data[offset : offset + size])
        except ValueError:
            damaged.append(chunk)
    return damaged


def digest(objects: Iterable[Sequence[bytes]], *, seed: int) -> int:
    """Return the xxh3-64 of the objects' bytes, one after the other. seed: see `integrity.shard_seed`."""
    state = xxhash.xxh3_64(seed=seed)
    for pieces in objects:
        for piece in pieces:
            state.update(piece)
    return state.intdigest()
