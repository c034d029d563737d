import gzip
import hashlib
import zlib
from pathlib import Path


class CorruptDataError(RuntimeError):
    """A data file that is damaged or not what its name says; the message names the file and what to do."""


def read_content(path: Path, *, sha256: str | None = None) -> bytes:
    """What a file holds, decompressed if it is a gzip archive; the content decides that and not the name.

    Args:
        path: The file.
        sha256: SHA-256 of the decompressed content, where it is known.

    Raises:
        CorruptDataError: If the archive is damaged or the content is another one.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorruptDataError(f"{path} is a damaged gzip archive ({error}). {ADVICE}") from error
    if sha256 is not None:
        check_sha256(path, content, sha256, "a readable file")
    return content


def check_sha256(path: Path, content: bytes, sha256: str, what: str) -> None:
    """Raise ``CorruptDataError`` if the content is not the published one; ``what`` it is nevertheless."""
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise CorruptDataError(
            f"{path} is {what}, but not the published one: its content has the SHA-256 {found}, expected {sha256}."
            f" {ADVICE} A data module takes it as it is with verify=False."
        )


ADVICE = "Replace it by a good copy, or remove it to have it fetched."
