import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_opt.data import CorruptDataError, DataNotFoundError, IdxImages, write_idx
from lightning_opt.data.fetch import PublishedFile
from lightning_opt.models import Classifier

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # Lightning 2.6 with torch 2.13

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
VALUES: dict[str, Tensor] = {
    NAMES[0]: torch.arange(40 * 6).remainder(256).to(torch.uint8).view(40, 2, 3),
    NAMES[1]: torch.arange(40, dtype=torch.uint8) % 2,
    NAMES[2]: torch.arange(60, dtype=torch.uint8).view(10, 2, 3),
    NAMES[3]: torch.arange(10, dtype=torch.uint8) // 5,
}


def publish(folder: Path) -> type[IdxImages]:
    """Write a small data set into a folder; its mirrors do not answer."""
    folder.mkdir(parents=True, exist_ok=True)
    published = []
    for name, values in VALUES.items():
        write_idx(folder / name, values)
        write_idx(folder / f"{name}.gz", values)
        archive, content = ((folder / file).read_bytes() for file in (f"{name}.gz", name))
        published.append(PublishedFile(name, hashlib.sha256(archive).hexdigest(), hashlib.sha256(content).hexdigest()))
        (folder / name).unlink()

    class Tiny(IdxImages):
        classes, shape = ("even", "odd"), (1, 2, 3)
        folders = ("tiny-images", "Tiny/raw")
        mirrors = ("http://127.0.0.1:9/one/", "http://127.0.0.1:9/two/")
        files = {"train": (published[0], published[1]), "test": (published[2], published[3])}

    return Tiny


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LIGHTNING_OPT_DATA", raising=False)


def test_needs_no_file_of_another_stage(tmp_path: Path) -> None:
    data = publish(tmp_path / "given")(root=str(tmp_path / "given"))
    for name in NAMES[:2]:
        (tmp_path / "given" / f"{name}.gz").unlink()
    data.setup("test")
    assert data.test_set is not None
    assert torch.equal(data.test_set.images[:, 0], VALUES[NAMES[2]])
    assert torch.equal(data.test_set.labels, VALUES[NAMES[3]].long())
    with pytest.raises(DataNotFoundError, match=f"the file {NAMES[0]} is not at hand and was not fetched"):
        data.setup("fit")


@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("folder", [".", "tiny-images", "Tiny/raw"])
def test_reads_each_layout_below_the_root(tmp_path: Path, folder: str, compressed: bool) -> None:
    tiny = publish(tmp_path / folder)
    if not compressed:
        for path in (tmp_path / folder).iterdir():
            if path.suffix == ".gz":
                path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()
    data = tiny(root=str(tmp_path), val_size=10)
    data.prepare_data()
    data.setup()
    assert data.train_set is not None
    assert data.val_set is not None
    images = torch.cat([data.train_set.images, data.val_set.images])
    assert torch.equal(images.flatten(1).sort(dim=0).values, VALUES[NAMES[0]].flatten(1).sort(dim=0).values)
    assert len(data.val_set) == 10


@pytest.mark.parametrize("folder", ["tiny-images", "Tiny/raw"])
def test_reads_below_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    tiny = publish(tmp_path / folder)
    monkeypatch.setenv("LIGHTNING_OPT_DATA", str(tmp_path))
    data = tiny()
    data.prepare_data()
    assert torch.equal(data.load("test")[0], VALUES[NAMES[2]])


def test_reads_what_a_package_of_the_system_installed(tmp_path: Path) -> None:
    tiny = publish(tmp_path / "usr")
    tiny.system_folder = str(tmp_path / "usr")
    data = tiny()
    data.prepare_data()
    assert torch.equal(data.load("test")[0], VALUES[NAMES[2]])


def test_the_root_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = publish(tmp_path / "root")
    publish(tmp_path / "environment" / "tiny-images")
    write_idx(tmp_path / "root" / NAMES[2], VALUES[NAMES[2]] + 1)
    monkeypatch.setenv("LIGHTNING_OPT_DATA", str(tmp_path / "environment"))
    assert torch.equal(tiny(root=str(tmp_path / "root"), verify=False).load("test")[0], VALUES[NAMES[2]] + 1)
    assert torch.equal(tiny(verify=False).load("test")[0], VALUES[NAMES[2]])


def test_without_files_and_network_the_ways_to_provide_them_are_named(tmp_path: Path) -> None:
    tiny = publish(tmp_path / "elsewhere")
    tiny.system_folder, tiny.system_package = "/nowhere", "dataset-tiny"
    with pytest.raises(DataNotFoundError) as caught:
        tiny(root=str(tmp_path)).prepare_data()
    message = str(caught.value)
    head, searched = "Tiny: the file train-images-idx3-ubyte is not at hand and could not be fetched.\n", "\nSearched: "
    assert message.startswith(f"{head}To provide the files:\n  - put the files")
    assert f"{searched}{tmp_path}/tiny-images, {tmp_path}/Tiny/raw, {tmp_path}, /nowhere\n" in message
    assert message.partition(searched)[2].splitlines()[1:] == [  # what was tried comes last, a short line a mirror
        "Tried:",
        f"  - http://127.0.0.1:9/one/{NAMES[0]}.gz: [Errno 111] Connection refused",
        f"  - http://127.0.0.1:9/two/{NAMES[0]}.gz: [Errno 111] Connection refused",
    ]
    for way in (
        f"put the files ({', '.join(NAMES)}; each as it is or with .gz) into a folder DIR/tiny-images and set root=DIR",
        "LIGHTNING_OPT_DATA=DIR",
        "apt install dataset-tiny",
        f"run once with a network: they are fetched into {tmp_path}/cache/lightning-opt/tiny-images",
    ):
        assert way in message


def test_what_was_fetched_is_read_again_without_a_network(tmp_path: Path) -> None:
    tiny = publish(tmp_path / "cache" / "lightning-opt" / "tiny-images")  # where fetching puts it
    data = tiny()
    data.prepare_data()
    data.setup("test")
    assert data.test_set is not None
    assert len(data.test_set) == 10


class Trained(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), num_classes=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def new_trainer() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=1
    )


def test_the_trainer_fetches_the_files_of_its_stage_once(tmp_path: Path, serve: Callable[[Path], Any]) -> None:
    tiny = publish(tmp_path / "served")
    mirror = serve(tmp_path / "served")
    tiny.mirrors = (*tiny.mirrors, mirror.address)
    tested = {f"/{name}.gz": 1 for name in NAMES[2:]}
    for _ in range(2):
        new_trainer().test(Trained(), tiny(), verbose=False)
        assert mirror.requests == tested
    new_trainer().validate(Trained(), tiny(), verbose=False)
    assert mirror.requests == tested | {f"/{name}.gz": 1 for name in NAMES[:2]}


def test_the_trainer_asks_for_the_files_of_its_stage_alone(tmp_path: Path) -> None:
    tiny = publish(tmp_path)
    (tmp_path / f"{NAMES[0]}.gz").unlink()
    trainer = new_trainer()
    assert "test/accuracy" in trainer.test(Trained(), tiny(root=str(tmp_path)), verbose=False)[0]
    assert trainer.predict(Trained(), tiny(root=str(tmp_path))) is not None
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(DataNotFoundError, match="Tiny: the file train-images-idx3-ubyte is not at hand"):
            run(Trained(), datamodule=tiny(root=str(tmp_path)))


def test_another_content_is_refused_unless_verify_is_off(tmp_path: Path) -> None:
    tiny = publish(tmp_path)
    write_idx(tmp_path / NAMES[2], VALUES[NAMES[2]] + 1)
    with pytest.raises(CorruptDataError, match=f"{tmp_path / NAMES[2]} is a whole IDX file, but not the published one"):
        tiny(root=str(tmp_path)).setup("test")
    tiny(root=str(tmp_path), verify=False).setup("test")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (NAMES[2], VALUES[NAMES[2]][:9], "holds 9 images, but .*/t10k-labels-idx1-ubyte.gz labels of shape"),
        (NAMES[2], VALUES[NAMES[2]].view(10, 3, 2), r"holds images of shape \(3, 2\), expected \(2, 3\)"),
        (NAMES[3], VALUES[NAMES[2]], r"/t10k-labels-idx1-ubyte labels of shape \(10, 2, 3\): they do not belong"),
        (NAMES[3], VALUES[NAMES[3]] + 1, r"/t10k-labels-idx1-ubyte holds labels from 1 to 2, not 0 to 1"),
    ],
    ids=["fewer images", "turned images", "no labels", "too many classes"],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, file: str, values: Tensor, message: str) -> None:
    tiny = publish(tmp_path)
    write_idx(tmp_path / file, values)
    with pytest.raises(CorruptDataError, match=message):
        tiny(root=str(tmp_path), verify=False).setup("test")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    tiny = publish(tmp_path)
    path = tmp_path / f"{NAMES[1]}.gz"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptDataError, match=f"^{path} is a damaged gzip archive"):
        tiny(root=str(tmp_path)).setup("fit")
