import gzip
from pathlib import Path

import pytest
import torch

from lightning_opt.data import CorruptDataError, read_idx, write_idx

# two images of 2x3, written out by hand: type 8 (ubyte), three dimensions
BYTES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(12)])
SHA256 = "0d74d0b1c1c92474525312c377f3e5fbc23dc7db68d5ac54b97882cde5d13581"  # by sha256sum
IMAGES = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)


def test_reads_the_bytes_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(BYTES)
    images = read_idx(path)
    assert images.dtype == torch.uint8
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("name", ["values", "values.gz"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 2, 4), (2, 0, 4)], ids=str)
def test_reads_what_it_writes(tmp_path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 100, shape).to(dtype)
    write_idx(tmp_path / name, values)
    read = read_idx(tmp_path / name)
    assert read.dtype == dtype
    assert read.shape == shape
    assert torch.equal(read, values)


def test_writes_the_bytes_of_the_format(tmp_path: Path) -> None:
    write_idx(tmp_path / "plain", IMAGES)
    write_idx(tmp_path / "packed.gz", IMAGES)
    assert (tmp_path / "plain").read_bytes() == BYTES
    assert gzip.decompress((tmp_path / "packed.gz").read_bytes()) == BYTES


def test_the_content_decides_whether_it_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_bytes(BYTES)
    (tmp_path / "packed").write_bytes(gzip.compress(BYTES, compresslevel=1))
    assert torch.equal(read_idx(tmp_path / "plain.gz"), IMAGES)
    assert torch.equal(read_idx(tmp_path / "packed"), IMAGES)


def test_the_checksum_is_of_the_content_and_not_of_the_archive(tmp_path: Path) -> None:
    for level in (1, 9):
        path = tmp_path / f"level{level}.gz"
        path.write_bytes(gzip.compress(BYTES, compresslevel=level))
        with pytest.raises(CorruptDataError, match=rf"{path} is a whole IDX file, but not the published one"):
            read_idx(path, sha256=SHA256[::-1])
        assert torch.equal(read_idx(path, sha256=SHA256), IMAGES)


DAMAGED = {
    "empty": (b"", "is not an IDX file"),
    "a web page": (b"<!DOCTYPE html><html>", "is not an IDX file: it starts with the bytes '3c 21 44 4f'"),
    "an unknown type": (b"\0\0\x07" + BYTES[3:], "is not an IDX file"),
    "cut inside the header": (BYTES[:9], "is truncated: it ends inside its header"),
    "cut inside the values": (BYTES[:-1], r"is truncated: its header announces the dimensions \(2, 2, 3\) and so 28"),
    "too long": (BYTES + b"\0", "is too long: .* 28 bytes, it holds 29"),
    "a cut archive": (gzip.compress(BYTES)[:-9], "is a damaged gzip archive"),
    "an archive with a flipped bit": (gzip.compress(BYTES)[:-8] + b"\0" * 8, "is a damaged gzip archive"),
    "only the start of an archive": (gzip.compress(BYTES)[:5], "is a damaged gzip archive"),
    "an archive of nonsense": (gzip.compress(BYTES)[:10] + b"\xff" * 20, "is a damaged gzip archive"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match=rf"^{path} {message}.*Replace it by a good copy"):
        read_idx(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"torch.uint8, .* torch.float64; got {dtype}"):
        write_idx(tmp_path / "labels", torch.tensor([1, 2], dtype=dtype))
