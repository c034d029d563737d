import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_opt.data import CorruptDataError, DataNotFoundError, LibSVM
from lightning_opt.data.fetch import PublishedFile
from lightning_opt.models import MLP, Classifier

FEATURES = torch.randint(0, 3, (60, 4), generator=torch.Generator().manual_seed(0)).float()
FEATURES[:, 3] = torch.arange(60) + 1  # tells the rows apart
POSITIVE = FEATURES[:, 0] > 1


def table(labels: Any) -> str:
    """The rows in LIBSVM's format, zeros left out."""
    rows = (
        " ".join([str(label), *(f"{i}:{value:g}" for i, value in enumerate(row.tolist(), start=1) if value)])
        for label, row in zip(labels, FEATURES, strict=True)
    )
    return "\n".join(rows) + "\n"


CONTENT = table("+1" if positive else "-1" for positive in POSITIVE).encode()


def rows(data: LibSVM) -> dict[str, Tensor]:
    """Features and label of each row, in the order of the file within a split."""
    data.setup()
    sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    return {
        name: torch.cat([split.inputs, split.labels[:, None]], dim=1)
        for name, split in sets.items()
        if split is not None
    }


def test_the_parts_make_up_the_table(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(CONTENT)
    data = LibSVM(path=str(tmp_path / "mine"), val_size=10)
    parts = rows(data)
    assert {name: len(part) for name, part in parts.items()} == {"train": 38, "val": 10, "test": 12}
    whole = torch.cat(list(parts.values()))
    assert torch.equal(whole[whole[:, 3].argsort()], torch.cat([FEATURES, POSITIVE[:, None].float()], dim=1))
    assert data.classes == ("-1", "+1")
    assert data.num_features == 4
    assert data.num_classes == 2
    for part in parts.values():  # stratified: within one row of its share
        assert abs(part[:, -1].sum() - POSITIVE.float().mean() * len(part)) <= 1.5
    other = rows(LibSVM(path=str(tmp_path / "mine"), val_size=10, split_seed=1, seed=1))
    assert torch.equal(other["test"], parts["test"])
    assert not torch.equal(other["val"], parts["val"])


def test_batches(tmp_path: Path) -> None:
    (tmp_path / "mine.gz").write_bytes(gzip.compress(CONTENT))
    data = LibSVM(path=str(tmp_path / "mine.gz"), val_size=10, test_size=20, batch_size=8)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 6]
    assert batches[0][0].dtype == torch.float32
    assert batches[0][0].shape == (8, 4)
    assert batches[0][1].dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "classes"), [([0, 1, 2] * 20, ("0", "1", "2")), ([2, 1] * 30, ("1", "2")), ([-1, 3] * 30, ("-1", "+3"))]
)
def test_classes_are_numbered_in_the_order_of_their_labels(
    tmp_path: Path, labels: list[int], classes: tuple[str, ...]
) -> None:
    (tmp_path / "mine").write_text(table(labels))
    data = LibSVM(path=str(tmp_path / "mine"))
    found = torch.cat(list(rows(data).values()))
    assert data.classes == classes
    index = [int(c) for c in classes]
    assert found[found[:, 3].argsort(), -1].tolist() == [index.index(label) for label in labels]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html>", "is not a table in LIBSVM's format"),
        ("+1 1:2 oh\n", "is not a table in LIBSVM's format"),
        ("1 0:3\n2 1:2\n", "is not a table in LIBSVM's format"),  # features are numbered from 1
        ("", "has 0 rows"),
        ("1 1:2\n1 1:3\n", "has 2 rows with 1 different labels, expected 2 to 1000 integers"),
        ("0.5 1:2\n1 1:3\n", "is no table for classification"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine"
    path.write_text(content)
    with pytest.raises(CorruptDataError, match=f"^{path} .*{message}|^{path} {message}"):
        LibSVM(path=str(path)).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a9b"}, "name must be one of 'a8a', 'w8a'; got 'a9b'"),
        ({"test_size": 0}, "test_size must be >= 1"),
        ({"test_size": 1.0}, r"test_size as a share must be in \(0, 1\)"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_a_wrong_value_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LibSVM(**arguments)


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(CONTENT)
    path = str(tmp_path / "mine")
    with pytest.raises(MisconfigurationException, match="has 60 rows: test_size=60 takes 60 and leaves 0"):
        LibSVM(path=path, test_size=60).setup()
    with pytest.raises(MisconfigurationException, match="has 48 rows for training and validation: val_size=48"):
        LibSVM(path=path, val_size=48).setup()
    with pytest.raises(DataNotFoundError, match=f"there is no file {tmp_path}/absent"):
        LibSVM(path=str(tmp_path / "absent")).setup()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The small table in place of a8a; nothing at hand, no mirror answers."""
    from lightning_opt.data import libsvm

    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(libsvm._PUBLISHED, "a8a", (PublishedFile("a8a", sha256, sha256, served_as="a8a"), 123))
    monkeypatch.setattr(libsvm, "_MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LIGHTNING_OPT_DATA", raising=False)


@pytest.mark.usefixtures("published")
def test_a_published_table_has_its_width_and_trains_logistic_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_OPT_DATA", str(tmp_path))
    (tmp_path / "libsvm").mkdir()
    (tmp_path / "libsvm" / "a8a.gz").write_bytes(gzip.compress(CONTENT))

    class Logistic(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.1)

    data = LibSVM("a8a", val_size=10, batch_size=8)
    model = Logistic(MLP(in_features=data.num_features, hidden=(), num_classes=2), num_classes=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        max_epochs=20,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    assert trainer.global_step == 20 * 5
    assert data.train_set is not None
    assert data.train_set.inputs.shape == (38, 123)
    predicted = model(data.train_set.inputs).argmax(dim=1)
    assert (predicted == data.train_set.labels).float().mean() > 0.9  # the label depends on one feature alone


@pytest.mark.usefixtures("published")
def test_another_table_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a8a").write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptDataError, match=f"{tmp_path}/a8a is a readable file, but not the published one"):
        LibSVM(root=str(tmp_path)).setup()
    LibSVM(root=str(tmp_path), verify=False).setup()


@pytest.mark.usefixtures("published")
def test_fetches_once_or_names_the_ways_to_provide_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Path], Any]
) -> None:
    from lightning_opt.data import libsvm

    with pytest.raises(DataNotFoundError) as caught:
        LibSVM().prepare_data()
    for part in ("LibSVM: the file a8a is not at hand", "(a8a, w8a; ", "DIR/libsvm", "LIGHTNING_OPT_DATA=DIR"):
        assert part in str(caught.value)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a8a").write_bytes(CONTENT)
    mirror = serve(tmp_path / "served")
    monkeypatch.setattr(libsvm, "_MIRRORS", (mirror.address,))
    for _ in range(2):
        data = LibSVM()
        data.prepare_data()
        data.setup()
    assert mirror.requests == {"/a8a": 1}


def test_a_config_builds_it_by_its_short_name() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    arguments: dict[str, Any] = {"name": "w8a", "test_size": 0.25, "batch_size": 7, "val_size": 0.2, "root": "/there"}
    data = parser.instantiate(parser.parse_object({"data": {"class_path": "LibSVM", "init_args": arguments}})).data
    assert type(data) is LibSVM
    assert {key: getattr(data, key) for key in arguments} == arguments
    assert data.num_features == 300
