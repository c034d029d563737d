import itertools
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_opt.data import ResumableLoader

WORKERS = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


def in_order(loader, epoch=0):
    return list(itertools.chain(*epoch_of(loader, epoch)))


def test_every_epoch_is_a_permutation_of_its_own():
    loader = ResumableLoader(range(30), 8, shuffle=True, seed=1)
    orders = [tuple(in_order(ResumableLoader(range(30), 8, shuffle=True, seed=s), e)) for s in (0, 1) for e in range(3)]
    assert len(set(orders)) == 6  # no two of them alike, as they would be from seed + epoch
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert tuple(in_order(loader, 2)) == orders[5]
    assert tuple(in_order(loader, 1)) == orders[4]  # whatever was read before
    assert [len(batch) for batch in epoch_of(loader, 0)] == [8, 8, 8, 6]
    assert in_order(ResumableLoader(range(30), 8), 3) == list(range(30))


@pytest.mark.parametrize("kwargs", WORKERS)
def test_every_position(kwargs):
    """The position counts the batches handed out, whatever the workers have fetched beyond."""
    loader = ResumableLoader(range(21), 4, shuffle=True, seed=5, **kwargs)
    whole = epoch_of(loader, 2)
    passed = iter(loader)
    for position in range(len(whole) + 1):
        state = loader.state_dict()
        if position:
            assert state["batches"] == position
            resumed = ResumableLoader(range(21), 4, shuffle=True, seed=5, **kwargs)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert [batch.tolist() for batch in resumed] == whole[position:]
            assert epoch_of(resumed, 3) == epoch_of(ResumableLoader(range(21), 4, shuffle=True, seed=5), 3)
        next(passed, None)


def test_another_epoch_drops_the_position():
    loader = ResumableLoader(range(10), 3, shuffle=True)
    whole = epoch_of(loader, 1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    loader.sampler.set_epoch(2)
    assert loader.state_dict() == {**state, "epoch": 2, "batches": 0}

    resumed = ResumableLoader(range(10), 3, shuffle=True)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == len(whole)


@pytest.mark.parametrize("kwargs", WORKERS)
def test_epoch_may_be_set_after_the_iterator_was_made(kwargs):
    loader = ResumableLoader(range(10), 3, shuffle=True, **kwargs)
    expected = epoch_of(loader, 4)
    loader.sampler.set_epoch(0)
    batches = iter(loader)
    loader.sampler.set_epoch(4)
    assert [batch.tolist() for batch in batches] == expected


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def test_augmentation_in_workers_is_a_function_of_the_batch():
    def batches(loader, epoch=0):
        loader.sampler.set_epoch(epoch)
        return torch.cat(list(loader))

    loader = ResumableLoader(Noisy(), 2, num_workers=2)
    whole = batches(loader)
    assert whole.equal(batches(ResumableLoader(Noisy(), 2, num_workers=1)))
    persistent = ResumableLoader(Noisy(), 2, num_workers=2, persistent_workers=True)
    assert not whole.equal(batches(persistent, 1))
    assert whole.equal(batches(persistent))
    assert len(set(whole[:, 1:].flatten().tolist())) == 36  # three generators, all numbers different
    loader.load_state_dict({**loader.state_dict(), "batches": 3})
    assert whole[6:].equal(torch.cat(list(loader)))
    assert not whole.equal(batches(ResumableLoader(Noisy(), 2, num_workers=2, seed=1)))


@pytest.mark.parametrize("kwargs", WORKERS)
def test_global_random_state_is_left_alone(kwargs):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loader = ResumableLoader(range(10), 3, shuffle=True, **kwargs)
    list(loader)
    list(loader)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class WholeBatches(Dataset):
    def __init__(self):
        self.asked = []

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        return torch.tensor(indices) * 10, {"index": torch.tensor(indices)}


def test_a_whole_batch_is_one_call_and_is_not_collated():
    dataset = WholeBatches()
    tens, named = next(iter(ResumableLoader(dataset, 4)))
    assert dataset.asked == [[0, 1, 2, 3]]
    assert tens.tolist() == [0, 10, 20, 30]
    assert named["index"].tolist() == [0, 1, 2, 3]
    tens, _ = next(iter(ResumableLoader(Subset(dataset, [7, 8, 9]), 2)))
    assert tens.tolist() == [70, 80]


def test_a_list_of_samples_is_collated():
    data = TensorDataset(torch.arange(6.0).reshape(6, 1), torch.arange(6))
    x, y = next(iter(ResumableLoader(Subset(data, [5, 4]), 2)))
    assert x.tolist() == [[5.0], [4.0]]
    assert y.tolist() == [5, 4]
    assert next(iter(ResumableLoader(range(4), 2, collate_fn=sum))) == 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_epoch(monkeypatch, drop_last):
    """Every rank makes as many batches; samples are repeated only where a rank would make one batch fewer."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for size, ranks, batch_size in itertools.product(range(1, 20), (1, 2, 3, 5), (1, 2, 4)):
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            loader = ResumableLoader(range(size), batch_size, shuffle=True, seed=7, drop_last=drop_last)
            shares.append(epoch_of(loader, 3))
            assert len(loader) == len(shares[-1])
            if len(shares[-1]) > 1:
                loader.load_state_dict({**loader.state_dict(), "batches": 1})
                assert [batch.tolist() for batch in loader] == shares[-1][1:]
        assert len({len(share) for share in shares}) == 1
        samples = list(itertools.chain(*itertools.chain(*shares)))
        if drop_last:
            assert len(samples) == len(set(samples)) == size // ranks // batch_size * batch_size * ranks
        else:
            assert set(samples) == set(range(size))
            fewer = size % ranks and size // ranks % batch_size == 0  # then one rank has a batch more than another
            assert len(samples) == (-(-size // ranks) * ranks if fewer else size)


def test_the_trainer_keeps_its_own_sampler_out():
    assert isinstance(ResumableLoader(range(3)).sampler, DistributedSampler)
    assert ResumableLoader(range(3)).batch_sampler.sampler is not None


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be >= 1 and finite, got 0"),
        ("batch_size", 2.5, "batch_size must be an integer, got 2.5"),
        ("seed", -1, "seed must be >= 0"),
        ("in_order", False, "in_order must be True"),
        ("sampler", RandomSampler(range(3)), "sampler must be None: ResumableLoader makes its own, got RandomSampler"),
        ("batch_sampler", [[0]], "sampler must be None"),
        ("batch_sampler", BatchSampler(SequentialSampler(range(3)), 2, False), "sampler must be None"),
    ],
)
def test_wrong_arguments(argument, value, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(range(3), **{argument: value})


def test_needs_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(ValueError, match="dataset must have a length and be read by index, got Stream"):
        ResumableLoader(Stream())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was 1 and is 0"),
        ({"dataset": range(19)}, "dataset_size was 20 and is 19"),
    ],
)
def test_an_epoch_cannot_be_continued_otherwise(change, message):
    settings = {"dataset": range(20), "batch_size": 4, "shuffle": True}
    loader = ResumableLoader(**settings)
    batches = iter(loader)
    next(batches)
    other = ResumableLoader(**{**settings, **change})
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=message):
        next(iter(other))
    other.sampler.set_epoch(1)
    assert len(list(other)) == len(other)  # from the next epoch on it does not matter


# --- a batch size that changes ---


def read(loader, changes, first=0):
    """The batches of what is left of an epoch; before batch k is asked for, the size becomes changes[k]."""
    out, batches = [], iter(loader)
    for number in itertools.count(first):
        if number in changes:
            loader.set_batch_size(changes[number])
        batch = next(batches, None)
        if batch is None:
            return out
        out.append(batch.tolist())
    return out


CHANGES = {1: 5, 3: 2, 4: 1, 5: 9}


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batch_size_changes_within_an_epoch(drop_last):
    loader = ResumableLoader(range(30), 3, shuffle=True, seed=4, drop_last=drop_last)
    batches = read(loader, CHANGES)
    assert [len(batch) for batch in batches] == [3, 5, 5, 2, 1, 9, *([] if drop_last else [5])]
    order = in_order(ResumableLoader(range(30), 3, shuffle=True, seed=4))
    assert list(itertools.chain(*batches)) == order[: 25 if drop_last else 30]
    assert len(loader) == len(batches)
    assert [loader.place(i).start for i in range(6)] == [0, 3, 8, 13, 15, 16]
    assert loader.batch_size == loader.batch_sampler.batch_size == 9
    assert loader.initial_batch_size == 3
    assert [len(batch) for batch in epoch_of(loader, 1)] == [9, 9, 9, *([] if drop_last else [3])]


@pytest.mark.parametrize("kwargs", WORKERS)
def test_the_length_is_true_after_every_change(kwargs):
    for size in (7, 10, 23):
        loader = ResumableLoader(range(size), 2, shuffle=True, **kwargs)
        batches, done = iter(loader), 0
        for batch_size in (2, 3, 1, 4):
            loader.set_batch_size(batch_size)
            done += next(batches, None) is not None
        expected = len(loader)
        assert done + len(list(batches)) == expected == len(loader)


@pytest.mark.parametrize("kwargs", WORKERS)
def test_every_position_among_changes(kwargs):
    """Resumed before any batch, the sizes are those of the whole pass: fetched ahead, drawn, and those to come."""
    loader = ResumableLoader(range(60), 3, shuffle=True, seed=5, **kwargs)
    states, batches = [], iter(loader)
    whole = []
    for number in itertools.count():
        if number in CHANGES:
            loader.set_batch_size(CHANGES[number])
        states.append(loader.state_dict())
        batch = next(batches, None)
        if batch is None:
            break
        whole.append(batch.tolist())
    assert sorted(itertools.chain(*whole)) == list(range(60))
    assert len({len(batch) for batch in whole}) > 2
    for position in range(1, len(whole)):
        resumed = ResumableLoader(range(60), 3, shuffle=True, seed=5, **kwargs)
        resumed.load_state_dict(states[position])
        assert resumed.state_dict() == states[position]
        assert len(resumed) == states_length(states[position])
        changes = {number: size for number, size in CHANGES.items() if number > position}
        assert read(resumed, changes, position) == whole[position:]


def states_length(state):
    """Batches of the epoch, from the sizes in a state."""
    start, (first, size) = 0, state["sizes"][0]
    for later, following in state["sizes"][1:]:
        start, first, size = start + (later - first) * size, later, following
    return first - (-(60 - start) // size)


def test_ranks_share_an_epoch_whose_batches_grow(monkeypatch):
    """As many batches on every rank, every sample read, and what a rank knows of the others' batches is true."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for size, ranks, second in itertools.product(range(9, 30), (1, 2, 3), (1, 3, 5)):
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        shares, told = [], []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            loader = ResumableLoader(range(size), 2, shuffle=True, seed=7)
            shares.append(read(loader, {1: second}))
            assert len(loader) == len(shares[-1])
            assert [loader.place(i).samples for i in range(len(loader))] == [len(batch) for batch in shares[-1]]
            told.append([loader.place(i).samples_of_all for i in range(len(loader))])
        assert len({len(share) for share in shares}) == 1
        assert set(itertools.chain(*itertools.chain(*shares))) == set(range(size))
        together = [sum(map(len, batches)) for batches in zip(*shares, strict=True)]
        assert all(counts == together for counts in told)


def test_an_epoch_may_be_limited():
    loader = ResumableLoader(range(30), 4, shuffle=True)
    loader.limit = 13
    assert [len(batch) for batch in epoch_of(loader, 0)] == [4, 4, 4, 1]
    assert len(loader) == 4


@pytest.mark.parametrize(("value", "message"), [(0, "batch_size must be >= 1"), (2.5, "must be an integer, got 2.5")])
def test_wrong_batch_sizes(value, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(range(3)).set_batch_size(value)


def test_states_of_older_versions_load():
    loader = ResumableLoader(range(10), 3, shuffle=True)
    whole = epoch_of(loader, 0)
    resumed = ResumableLoader(range(10), 3, shuffle=True)
    resumed.load_state_dict({k: v for k, v in {**loader.state_dict(), "batches": 2}.items() if k != "sizes"})
    assert [batch.tolist() for batch in resumed] == whole[2:]


def test_pickles():
    loader = ResumableLoader(range(10), 4, shuffle=True, seed=3, num_workers=2)
    assert in_order(pickle.loads(pickle.dumps(loader))) == in_order(loader)


class Echo(pl.LightningModule):
    """Returns and keeps what it is given."""

    def __init__(self, loader):
        super().__init__()
        self.loader, self.seen = loader, []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def train_dataloader(self):
        return self.loader()

    predict_dataloader = train_dataloader

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight * 0

    def predict_step(self, batch, batch_idx):
        return batch.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Indices(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.indices = batch_indices


def trainer(folder, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**quiet, enable_checkpointing=False, default_root_dir=folder, **kwargs)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("in_hook", [False, True])
def test_predict_is_in_order_and_knows_its_indices(tmp_path, in_hook, num_workers):
    """The Trainer makes the loader anew around a recorder of indices."""
    writer = Indices("epoch")
    runner = trainer(tmp_path, callbacks=[writer])

    def loader():
        return ResumableLoader(range(10), batch_size=4, drop_last=True, seed=2, num_workers=num_workers)

    module = Echo(loader)
    out = runner.predict(module) if in_hook else runner.predict(module, loader())
    assert out == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]  # drop_last is off for predictions
    assert writer.indices == [out]
    assert {type(index) for batches in writer.indices for batch in batches for index in batch} == {int}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("in_hook", [False, True])
def test_overfit_batches_reads_the_same_batches_in_order(tmp_path, in_hook):
    def loader():
        return ResumableLoader(range(10), batch_size=4, shuffle=True)

    module = Echo(loader)
    runner = trainer(tmp_path, max_epochs=2, overfit_batches=2)
    runner.fit(module) if in_hook else runner.fit(module, loader())
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert isinstance(runner.train_dataloader, ResumableLoader)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.parametrize("reload", [0, 1])
def test_the_trainer_sets_the_epoch(tmp_path, reload):
    module = Echo(lambda: ResumableLoader(range(10), batch_size=4, shuffle=True, num_workers=2))
    trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=reload).fit(module)
    assert module.seen == [batch for epoch in range(3) for batch in epoch_of(module.loader(), epoch)]


def test_is_a_data_loader():
    assert issubclass(ResumableLoader, DataLoader)
