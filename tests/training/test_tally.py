"""A mean over an epoch is exact, and a part of a checkpoint."""

import torch

from pipeline.training.tally import Mean


def test_batches_count_by_their_pictures() -> None:
    mean = Mean()
    mean.update(torch.tensor(6.0), 3)
    mean.update(torch.tensor(2.0), 1)
    assert mean.compute().item() == 2.0
    mean.reset()
    mean.update(torch.tensor(5.0), 5)
    assert mean.compute().item() == 1.0


def test_whole_numbers_do_not_wear_out() -> None:
    mean = Mean(dtype=torch.int64)
    mean.update(torch.tensor(2**24), 2**24)
    mean.update(torch.tensor(1), 1)
    assert mean.total.item() == 2**24 + 1


def test_half_an_epoch_goes_on_from_a_checkpoint() -> None:
    first, second = Mean(persistent=True), Mean(persistent=True)
    first.update(torch.tensor(6.0), 3)
    second.load_state_dict(first.state_dict())
    second.update(torch.tensor(2.0), 1)
    assert second.compute().item() == 2.0
    assert not Mean().state_dict()
