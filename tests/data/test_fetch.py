import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooch
import pytest

from lightning_opt.data import DataNotFoundError
from lightning_opt.data.fetch import PublishedFile, fetch_file, find_file, local_folders

ARCHIVE = gzip.compress(b"the content", mtime=0)
FILE = PublishedFile("labels-idx1-ubyte", hashlib.sha256(ARCHIVE).hexdigest())
NOBODY = "http://127.0.0.1:9/"  # the discard port: refused at once


@pytest.fixture
def mirror(tmp_path: Path, serve: Callable[[Path], Any]) -> Any:
    """Serves the file, under ``good/``, and another content of that name, under ``bad/``."""
    for name, content in (("good", ARCHIVE), ("bad", b"something else")):
        (tmp_path / "served" / name).mkdir(parents=True)
        (tmp_path / "served" / name / "labels-idx1-ubyte.gz").write_bytes(content)
    return serve(tmp_path / "served")


def test_fetches_once(mirror: Any, tmp_path: Path) -> None:
    for _ in range(2):
        path = fetch_file(FILE, [mirror.address + "good/"], tmp_path / "cache")
        assert path == tmp_path / "cache" / "labels-idx1-ubyte.gz"
        assert path.read_bytes() == ARCHIVE
    assert mirror.requests == {"/good/labels-idx1-ubyte.gz": 1}


def test_shows_progress(mirror: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_file(FILE, [mirror.address + "good/"], tmp_path)
    assert "100%" in capfd.readouterr().err


def test_says_once_what_it_fetches(
    mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_opt.data.fetch.rank_zero_info", said.append)
    level = pooch.get_logger().level
    for _ in range(2):
        fetch_file(FILE, [NOBODY, mirror.address + "good/"], tmp_path)
    assert said == [f"Fetching labels-idx1-ubyte.gz into {tmp_path}"]
    assert "Downloading" not in capfd.readouterr().err  # pooch's line for each mirror
    assert pooch.get_logger().level == level


@pytest.mark.parametrize("first", ["absent/", "bad/"])
def test_falls_back_to_the_next_mirror(mirror: Any, tmp_path: Path, first: str) -> None:
    path = fetch_file(FILE, [NOBODY, mirror.address + first, mirror.address + "good/"], tmp_path / "cache")
    assert path.read_bytes() == ARCHIVE
    assert mirror.requests == {f"/{first}labels-idx1-ubyte.gz": 1, "/good/labels-idx1-ubyte.gz": 1}
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_says_why_each_mirror_failed_and_keeps_nothing(mirror: Any, tmp_path: Path) -> None:
    mirrors = [NOBODY, mirror.address + "absent/", mirror.address + "bad/"]
    with pytest.raises(DataNotFoundError) as caught:
        fetch_file(FILE, mirrors, tmp_path / "cache")
    refused, absent, bad = str(caught.value).splitlines()
    assert refused == f"{NOBODY}labels-idx1-ubyte.gz: [Errno 111] Connection refused"
    assert absent.startswith(f"{mirrors[1]}labels-idx1-ubyte.gz: 404")
    assert bad.startswith(f"{mirrors[2]}labels-idx1-ubyte.gz: SHA256 hash of downloaded file")
    assert list((tmp_path / "cache").iterdir()) == []


def test_replaces_a_damaged_file_in_the_cache(mirror: Any, tmp_path: Path) -> None:
    (tmp_path / "labels-idx1-ubyte.gz").write_bytes(ARCHIVE[:-1])
    assert fetch_file(FILE, [mirror.address + "good/"], tmp_path).read_bytes() == ARCHIVE


def test_a_folder_that_cannot_be_written_is_named(mirror: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataNotFoundError, match=str(tmp_path / "cache")):
        fetch_file(FILE, [mirror.address + "good/"], tmp_path / "cache")


def test_finds_the_first_in_the_order_of_the_folders(tmp_path: Path) -> None:
    for path in ("b/file.gz", "c/file", "c/file.gz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "a" / "file").mkdir(parents=True)  # a folder is no file
    assert find_file("file", [tmp_path / name for name in "abc"]) == tmp_path / "b/file.gz"
    assert find_file("file", [tmp_path / name for name in "cab"]) == tmp_path / "c/file"
    assert find_file("file", [tmp_path / "a"]) is None


def test_searches_the_root_then_the_environment_then_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OPT_DATA", "/shared")
    monkeypatch.setenv("HOME", "/home/me")
    assert local_folders("~/data", ["mnist", "MNIST/raw"], "/usr/share/mnist") == [
        Path(path)
        for path in (
            "/home/me/data/mnist",
            "/home/me/data/MNIST/raw",
            "/home/me/data",
            "/shared/mnist",
            "/shared/MNIST/raw",
            "/usr/share/mnist",
        )
    ]
    monkeypatch.delenv("LIGHTNING_OPT_DATA")
    assert local_folders(None, ["mnist"], None) == []
