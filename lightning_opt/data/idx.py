import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .content import ADVICE, CorruptDataError, check_sha256, read_content


def read_idx(path: str | os.PathLike[str], *, sha256: str | None = None) -> Tensor:
    """Read an IDX file, the format of MNIST and its relatives, plain or gzip-compressed.

    Compression is recognized by the content and not by the file name. The header must be that of an IDX file and the
    length must be the one that it announces.

    Args:
        path: The file.
        sha256: SHA-256 of the decompressed content, where it is known.

    Returns:
        The array in the shape and dtype of the header; for images ``[N, H, W]`` uint8, for labels ``[N]`` uint8.

    Raises:
        CorruptDataError: If the file is truncated, not an IDX file, of another length than announced, or of other
            content than ``sha256``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "labels-idx1-ubyte.gz")
        >>> write_idx(path, torch.tensor([3, 1, 4], dtype=torch.uint8))
        >>> read_idx(path)
        tensor([3, 1, 4], dtype=torch.uint8)
    """
    content = read_content(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise CorruptDataError(
            f"{path} is not an IDX file: it starts with the bytes {content[:4].hex(' ')!r}. {ADVICE}"
        )
    dtype, start = _DTYPES[content[2]], 4 + 4 * content[3]
    if len(content) < start:
        raise CorruptDataError(f"{path} is truncated: it ends inside its header. {ADVICE}")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    announced = start + math.prod(shape) * dtype.itemsize
    if len(content) != announced:
        what = "truncated" if len(content) < announced else "too long"
        raise CorruptDataError(
            f"{path} is {what}: its header announces the dimensions {shape} and so {announced} bytes, it holds"
            f" {len(content)}. {ADVICE}"
        )
    if sha256 is not None:
        check_sha256(Path(path), content, sha256, "a whole IDX file")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def write_idx(path: str | os.PathLike[str], values: Tensor) -> None:
    """Write an IDX file, gzip-compressed if the name ends in ``.gz``.

    Args:
        path: The file to write; one that is there is replaced.
        values: uint8, int8, int16, int32, float32 or float64; anything else raises ``ValueError``.
    """
    codes = {f"torch.{dtype.name}": code for code, dtype in _DTYPES.items()}
    if str(values.dtype) not in codes:
        raise ValueError(f"values must be of one of the dtypes {', '.join(codes)}; got {values.dtype}")
    code = codes[str(values.dtype)]
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
    content = header + values.numpy().astype(_DTYPES[code]).tobytes()
    Path(path).write_bytes(gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)


_DTYPES: dict[int, np.dtype] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
