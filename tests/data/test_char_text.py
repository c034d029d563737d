import gzip
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt.data import CharText, CorruptDataError, DataNotFoundError, ResumableLoader, TinyShakespeare
from lightning_opt.data.fetch import PublishedFile

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def alphabets(tmp_path: Path) -> str:
    """A file of 1,000 characters, of which the training part lacks some."""
    path = tmp_path / "text"
    path.write_text((ALPHABET * 40)[:800] + "ÄÖ" * 50 + "z" * 100)
    return str(path)


def ready(data: CharText) -> CharText:
    data.setup()
    return data


def windows(loader: Any) -> list[tuple[list[int], list[int]]]:
    return [pair for inputs, targets in loader for pair in zip(inputs.tolist(), targets.tolist(), strict=True)]


def test_the_bundled_text_is_the_whole_play_of_coriolanus() -> None:
    text = CharText().read_text()
    assert len(text) == 154_469
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n")
    assert text.endswith("\nYet he shall have a noble memory. Assist.\n")
    assert text.isascii()


def test_training_windows_cover_the_training_text_once_in_an_order_of_seed_and_epoch(alphabets: str) -> None:
    data = ready(CharText(alphabets, context=9, batch_size=4))
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loader = ready(CharText(alphabets, context=9, batch_size=4, seed=seed)).train_dataloader()
        loader.sampler.set_epoch(epoch)
        orders.append(windows(loader))
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    # the alphabet has 26 letters, 9 * 88 = 792 of 800 characters lie in windows whose last target exists
    starts = [9 * i % 26 for i in range(88)]
    expected = [([(s + k) % 26 + 1 for k in range(9)], [(s + k + 1) % 26 + 1 for k in range(9)]) for s in starts]
    for order in orders:
        assert sorted(order) == sorted(expected)


def test_a_smaller_stride_gives_overlapping_training_windows_alone(alphabets: str) -> None:
    data = ready(CharText(alphabets, context=9, stride=3))
    assert data.train_set is not None
    assert data.val_set is not None
    # starts 0, 3, ..., the last with start + 9 <= 799
    assert len(data.train_set) == 790 // 3 + 1
    assert data.train_set[1][0].tolist() == list(range(4, 13))
    assert len(data.val_set) == 99 // 9


@pytest.mark.parametrize(("size", "count"), [(9, 0), (10, 1), (18, 1), (19, 2)])
def test_a_window_needs_its_last_target(tmp_path: Path, size: int, count: int) -> None:
    (tmp_path / "text").write_text("ab" * 50)
    data = CharText(str(tmp_path / "text"), context=9, val_size=size, test_size=20)
    if count:
        assert len(windows(ready(data).val_dataloader())) == count
    else:
        with pytest.raises(MisconfigurationException, match="val_size=9 and test_size=20 leave 9 for validation"):
            data.setup()


def test_the_vocabulary_is_that_of_the_training_text_and_others_are_unknown(alphabets: str) -> None:
    data = ready(CharText(alphabets, context=9))
    assert data.characters == ALPHABET
    assert data.vocab_size == 27
    assert {index for inputs, _ in windows(data.val_dataloader()) for index in inputs} == {0}
    assert {index for inputs, _ in windows(data.test_dataloader()) for index in inputs} == {26}
    assert windows(data.predict_dataloader()) == windows(data.test_dataloader())
    assert data.encode("baz!").tolist() == [2, 1, 26, 0]
    assert data.decode(torch.tensor([2, 1, 26, 0])) == "baz\N{REPLACEMENT CHARACTER}"


def test_evaluation_windows_follow_each_other_in_the_text() -> None:
    data = ready(CharText(context=50, eval_batch_size=7))
    text = data.read_text()
    val = round(0.1 * len(text))
    train = len(text) - 2 * val
    read = "".join(data.decode(torch.tensor(inputs)) for inputs, _ in windows(data.val_dataloader()))
    assert len(read) == (val - 1) // 50 * 50
    assert read == text[train : train + len(read)]


def test_a_compressed_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + "Käse ".encode() * 20
    for name, raw in (("plain.txt", content), ("packed.txt", gzip.compress(content))):
        (tmp_path / name).write_bytes(raw)
        assert CharText(str(tmp_path / name)).read_text() == "Käse " * 20


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=f"CharText: there is no file {tmp_path}/absent"):
        CharText(str(tmp_path / "absent")).setup()
    (tmp_path / "latin").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(CorruptDataError, match=f"{tmp_path}/latin is not text in UTF-8"):
        CharText(str(tmp_path / "latin")).setup()


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("context", 0, ">= 1"),
        ("stride", 0, ">= 1"),
        ("batch_size", 0, ">= 1"),
        ("eval_batch_size", 0, ">= 1"),
        ("val_size", 0, ">= 1"),
        ("val_size", 1.0, r"in \(0, 1\)"),
        ("test_size", math.nan, r"in \(0, 1\)"),
        ("seed", -1, ">= 0"),
        ("num_workers", -1, ">= 0"),
    ],
)
def test_a_wrong_value_is_refused_at_construction(name: str, value: float, accepted: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.* must be {accepted}.* got {value}$"):
        CharText(**{name: value})


def test_use_before_setup() -> None:
    for use in (CharText().train_dataloader, lambda: CharText().encode("a"), lambda: CharText().decode(torch.zeros(1))):
        with pytest.raises(RuntimeError, match=r"call setup\(\) of CharText first"):
            use()


def test_a_checkpoint_of_another_vocabulary_is_refused(alphabets: str) -> None:
    state = ready(CharText(alphabets, context=9)).state_dict()
    ready(CharText(alphabets, context=20, batch_size=5)).load_state_dict(state)
    with pytest.raises(ValueError, match=f"made with the characters '{ALPHABET}', the training text of this CharText"):
        ready(CharText()).load_state_dict(state)


def test_reading_uses_no_global_random_state(alphabets: str) -> None:
    state = torch.get_rng_state()
    windows(ready(CharText(alphabets, context=9)).train_dataloader())
    assert torch.equal(state, torch.get_rng_state())


TEXT = ("To be, or not to be: " * 100).encode()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PublishedFile:
    """A short text in place of the published one; nothing at hand, no mirror answers."""
    from lightning_opt.data import char_text

    sha256 = hashlib.sha256(TEXT).hexdigest()
    file = PublishedFile("tiny_shakespeare.txt", sha256, sha256, served_as="input.txt")
    monkeypatch.setattr(char_text, "_TINY_SHAKESPEARE", file)
    monkeypatch.setattr(char_text, "_MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LIGHTNING_OPT_DATA", raising=False)
    return file


@pytest.mark.parametrize(
    ("by", "where"),
    [
        ("root", "tiny_shakespeare.txt"),
        ("root", "tiny-shakespeare/tiny_shakespeare.txt"),
        ("environment", "text/tiny_shakespeare.txt.gz"),
    ],
)
def test_tiny_shakespeare_is_found_in_a_folder(
    published: PublishedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, where: str
) -> None:
    path = tmp_path / "data" / where
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(TEXT) if where.endswith(".gz") else TEXT)
    if by == "environment":
        monkeypatch.setenv("LIGHTNING_OPT_DATA", str(tmp_path / "data"))
    data = TinyShakespeare(root=str(tmp_path / "data") if by == "root" else None)
    data.prepare_data()
    assert ready(data).read_text() == TEXT.decode()
    path.write_bytes(TEXT[:-1])
    with pytest.raises(CorruptDataError, match=f"{path} is a readable file, but not the published one"):
        data.read_text()
    data.verify = False
    assert data.read_text() == TEXT[:-1].decode()


def test_tiny_shakespeare_is_fetched_once_as_it_is_served(
    published: PublishedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Path], Any]
) -> None:
    from lightning_opt.data import char_text

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "input.txt").write_bytes(TEXT)
    mirror = serve(tmp_path / "served")
    monkeypatch.setattr(char_text, "_MIRRORS", (mirror.address,))
    for _ in range(2):
        data = TinyShakespeare()
        data.prepare_data()
        assert ready(data).read_text() == TEXT.decode()
    assert mirror.requests == {"/input.txt": 1}
    assert (tmp_path / "cache/lightning-opt/text/tiny_shakespeare.txt").read_bytes() == TEXT


def test_without_the_text_the_ways_to_provide_it_are_named(published: PublishedFile, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        TinyShakespeare(root=str(tmp_path)).prepare_data()
    for part in ("TinyShakespeare: the file tiny_shakespeare.txt", "DIR/text", f"Searched: {tmp_path}/text, "):
        assert part in str(caught.value)
    with pytest.raises(DataNotFoundError, match="was not fetched"):
        TinyShakespeare().setup()


@pytest.mark.parametrize("cls", [CharText, TinyShakespeare])
def test_a_config_builds_it_by_its_short_name(cls: type[CharText]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    arguments: dict[str, Any] = {"context": 32, "val_size": 0.2, "test_size": 100, "batch_size": 7, "seed": 3}
    arguments["path" if cls is CharText else "root"] = "/somewhere"
    config = {"data": {"class_path": cls.__name__, "init_args": arguments}}
    data = parser.instantiate(parser.parse_object(config)).data
    assert type(data) is cls
    assert {key: getattr(data, key) for key in arguments} == arguments
