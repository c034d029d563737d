"""Every mistake of a user: one message on stderr that names the thing and what is right, and exit status 2."""

from pathlib import Path

import pytest
import yaml

from lightning_opt.cli import main
from lightning_opt.cli.errors import explain

WORDS = {
    "--optimizer=AdaBelif": "optimizer: there is no Optimizer named 'AdaBelif'. Did you mean AdaBelief",
    "--optimizer=torch.optim.AdmW": "no Optimizer named 'torch.optim.AdmW'. Did you mean torch.optim.AdamW",
    "--optimizer=nosuch.AdamX": "'nosuch.AdamX' (No module named 'nosuch'). Did you mean Adam",
    "--optimizer=MLP": "optimizer: MLP is no Optimizer. Those of lightning-opt are AdaBelief, AdaGradNorm, DiffGrad",
    "--optimizer.lrr=3": "optimizer: AdaBelief has no argument 'lrr'. Did you mean lr?",
    "--optimizer.lr=abc": "optimizer.lr must be a number; got 'abc'.",
    "--optimizer.lr=-1": "AdaBelief: lr must be >= 0.0 and finite, got -1.0",
    "--optimizer.lr=.nan": "AdaBelief: lr must be >= 0.0 and finite, got nan",
    "--optimizer.betas=[1.5,0.9]": "AdaBelief: betas[0] must be in [0.0, 1.0), got 1.5",
    "--optimizer.betas=(1.5,0.9)": "optimizer.betas must be a list, written [a, b]; got '(1.5,0.9)'.",
    "--optimizer.betas=[1,2,3]": "optimizer.betas must be a list of two, written [a, b]; got '[1, 2, 3]'.",
    "--lr_scheduler=StepLR": "lr_scheduler: StepLR needs a value for step_size.",
    "--lr_scheduler.gamma=3": "lr_scheduler: name a class before its argument 'gamma': --lr_scheduler=CLASS",
    "--trainer.max_epoch=3": "there is no option 'trainer.max_epoch'. Did you mean trainer.max_epochs",
    "--trainr.max_epochs=3": "there is no option 'trainr'. Did you mean trainer?",
    "--trainer.max_epochs=abc": "trainer.max_epochs must be a whole number or null; got 'abc'.",
    "--trainer.precision=17": "trainer.precision must be one of 64, 32, 16, 'transformer-engine'",
    "--trainer.accelerator=gppu": "invalid accelerator name: `accelerator='gppu'`. Available names are",
    "--trainer.strategy=ddp_ef22": "trainer.strategy: there is no strategy named 'ddp_ef22'. Did you mean ddp_ef21",
    "--trainer.strategy=xyz": "trainer.strategy: there is no strategy named 'xyz'. There are cbo, ",
    "--trainer.callbacks=RunReprt": "trainer.callbacks: there is no Callback named 'RunReprt'. Did you mean RunReport",
    "--model=Clasifier": "model: there is no LightningModule named 'Clasifier'. Did you mean Classifier?",
    "--model.net=MPL": "model.net: there is no class named 'MPL'. Did you mean MLP?",
    "--model.net.hiden=[3]": "model.net: MLP has no argument 'hiden'. Did you mean hidden?",
    "--model.net.hidden=[0]": "MLP: hidden must be >= 1 and finite, got 0",
    "--data=Digit": "data: there is no LightningDataModule named 'Digit'. Did you mean Digits?",
    "--data.batch_size=0": "Digits: batch_size must be >= 1 and finite, got 0",
    "--checkpoint.every_n_train_steps=0": "PeriodicCheckpoint: every_n_train_steps must be >= 1",
    "--seed_everything=abc": "seed_everything must be true or false or a whole number; got 'abc'.",
    "--config=digits/quikstart": "no recipe is named 'digits/quikstart'. Did you mean digits/quickstart?",
    "--ckpt_path=nosuch.ckpt": "--ckpt_path=nosuch.ckpt: no such file.",
    "--ckpt_path=best": "--ckpt_path=best is known only within the fit that chose it",
    "optimizer=SGD": "unexpected word 'optimizer=SGD': options are written --key=value.",
    "--optimizer": "--optimizer: expected one argument",
}


@pytest.mark.parametrize(("word", "message"), WORDS.items(), ids=WORDS)
def test_wrong_words(word: str, message: str, capsys) -> None:
    assert main(["fit", *([] if word.startswith("--config") else ["--config=../quick.yaml"]), word]) == 2
    _assert_one_clear_message(capsys.readouterr().err, message)
    assert not list(Path().rglob("version_*"))  # refused before anything was written


def _at(path: str, value: object) -> dict:
    """The quick config with one entry set, or renamed where the path ends in ``old>new``."""
    config = yaml.safe_load(Path("../quick.yaml").read_text())
    *parents, key = path.split("/")
    node = config
    for parent in parents:
        node = node[parent]
    old, _, new = key.partition(">")
    if new:
        node[new] = node.pop(old)
    else:
        node[key] = value
    return config


CONFIGS = {
    "optimizer/class_path=AdaBelif": "optimizer: there is no Optimizer named 'AdaBelif'. Did you mean AdaBelief",
    "optimizer/class_path=lightning_opt.optim.AdaBelif": "Did you mean lightning_opt.optim.AdaBelief",
    "optimizer/init_args/lr>lrr": "optimizer: AdaBelief has no argument 'lrr'. Did you mean lr?",
    "optimizer/init_args>init_arg": "optimizer has no entry 'init_arg': a class is given by class_path and init_args.",
    "data/class_path>clas_path": "data is a class: give its name, or class_path and init_args.",
    "trainer>trainr": "there is no option 'trainr'. Did you mean trainer?",
    "optimizer>optimizr": "there is no option 'optimizr'. Did you mean optimizer?",
    "trainer/max_epochs>max_epoch": "there is no option 'trainer.max_epoch'. Did you mean trainer.max_epochs",
    "trainer/callbacks=[{class_path: RunReprt}]": "there is no Callback named 'RunReprt'. Did you mean RunReport",
    "trainer/callbacks=[RunReprt]": "there is no Callback named 'RunReprt'. Did you mean RunReport",
    "trainer/callbacks=[{class_path: EarlyStopping}]": "trainer.callbacks: EarlyStopping needs a value for monitor.",
    "trainer/callbacks=[{class_path: EarlyStopping, init_args: {monitr: x}}]": (
        "no argument 'monitr'. Did you mean monitor?"
    ),
    "trainer/callbacks=[{class_path: EarlyStopping, init_args: {monitor: x, patience: abc}}]": (
        "trainer.callbacks.patience must be a whole number; got 'abc'."
    ),
    "trainer/callbacks=[{class_path: EarlyStopping, init_args: {monitor: x, mode: y}}]": (
        "EarlyStopping: `mode` can be min, max, got y"
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.items(), ids=CONFIGS)
def test_a_wrong_config(change: str, message: str, capsys) -> None:
    path, _, value = change.partition("=")
    Path("own.yaml").write_text(yaml.safe_dump(_at(path, yaml.safe_load(value) if value else None)))
    assert main(["fit", "--config=own.yaml"]) == 2
    _assert_one_clear_message(capsys.readouterr().err, message)


def test_a_config_without_a_model(capsys) -> None:
    Path("own.yaml").write_text("optimizer: SGD")
    assert main(["fit", "--config=own.yaml"]) == 2
    _assert_one_clear_message(
        capsys.readouterr().err, "model is missing: give --model, or an entry 'model' in a config."
    )
    assert main(["fit", "--config=own.yaml", "--model=Classifier"]) == 2
    _assert_one_clear_message(capsys.readouterr().err, "model: Classifier needs a value for net.")


def test_options_before_the_command(capsys) -> None:
    assert main(["--optimizer=SGD", "fit"]) == 2
    _assert_one_clear_message(capsys.readouterr().err, "--optimizer=SGD: the command comes first")


def test_a_folder_that_cannot_be_written(run, capsys) -> None:
    Path("file").touch()
    assert run("fit", "--trainer.default_root_dir=file/runs") == 2
    error = capsys.readouterr().err
    _assert_one_clear_message(error, "cannot write to file/runs/quick (Not a directory)")
    assert "--trainer.default_root_dir" in error


def test_a_folder_on_another_machine(run, capsys) -> None:
    assert run("fit", "--trainer.default_root_dir=s3://bucket/runs") == 2
    _assert_one_clear_message(capsys.readouterr().err, "must be a local folder, got 's3://bucket/runs'")


def test_data_that_are_not_at_hand_without_a_network(run, monkeypatch, capsys) -> None:
    from lightning_opt.data import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ("http://127.0.0.1:9/",))  # nobody listens: refused at once
    monkeypatch.setattr(FashionMNIST, "system_folder", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    status = run("fit", "--data=FashionMNIST", "--data.root=nowhere", "--model.net.in_features=784")
    error = capsys.readouterr().err
    assert status == 1, error
    _assert_one_clear_message(error, "FashionMNIST: the file train-images-idx3-ubyte is not at hand", one_line=False)
    assert "LIGHTNING_OPT_DATA" in error
    assert "Downloading" not in error
    assert not list(Path("runs").rglob("version_*"))  # nothing was written into it


def test_damaged_data(run, capsys) -> None:
    folder = Path("data/mnist")
    folder.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (folder / name).write_bytes(b"\0\0\x08\x03\0\0")
    assert run("fit", "--data=MNIST", "--data.root=data", "--model.net.in_features=784") == 1
    _assert_one_clear_message(capsys.readouterr().err, "data/mnist/train-images-idx3-ubyte is truncated")


def test_a_combination_that_lightning_refuses(run, capsys) -> None:
    assert run("fit", "--trainer.max_epochs=1", "--trainer.overfit_batches=1.5") == 2
    _assert_one_clear_message(capsys.readouterr().err, "overfit_batches")


def test_a_module_without_an_optimizer(run, capsys) -> None:
    assert run("fit", "--optimizer=null") == 2
    _assert_one_clear_message(capsys.readouterr().err, "configure_optimizers")


def test_a_defect_keeps_its_traceback(run, monkeypatch) -> None:
    from lightning_opt.models import Classifier

    def training_step(self, batch):
        raise ValueError("a defect of the module")

    monkeypatch.setattr(Classifier, "training_step", training_step)
    with pytest.raises(ValueError, match="a defect of the module"):
        run("fit")


def test_a_defect_in_a_constructor_keeps_its_traceback(run, monkeypatch) -> None:
    def check_interval(*arguments: object, **options: object) -> None:
        raise AttributeError("a defect of the constructor")

    monkeypatch.setattr("lightning_opt.models.mlp.check_interval", check_interval)
    with pytest.raises(AttributeError, match="^a defect of the constructor$"):
        run("fit")


def test_a_report_of_unknown_kind_is_shown_as_it_is() -> None:
    assert explain("Something new.", []) == "Something new."


def _assert_one_clear_message(error: str, message: str, *, one_line: bool = True) -> None:
    last = error[error.index("lightning-opt: ") :]
    assert message in last
    assert "Traceback" not in error
    if one_line:
        assert last.count("\n") == 1, last
