"""Workers are started where batches are slow to make and the machine has cores to spare, and nowhere else."""

import pytest

from pipeline import machine
from pipeline.data import workers


@pytest.mark.parametrize(
    ("seconds", "batches", "cores", "processes", "accelerated", "expected"),
    [
        (1.0, 1000, 2, 1, False, 0),  # the net has both cores to do
        (1.0, 1000, 1, 1, True, 0),
        (1.0, 1000, 16, 1, False, 4),
        (1.0, 1000, 16, 1, True, 8),
        (1.0, 1000, 16, 4, True, 3),  # a share of the machine for each GPU
        (0.015, 1000, 16, 1, True, 2),  # as many as keep up with a quick step
        (0.001, 100_000, 16, 1, True, 0),  # handing it over would take as long
        (0.1, 20, 16, 1, True, 0),  # an epoch's batches are made in 2 s
    ],
)
def test_the_work_and_the_machine_decide(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    batches: int,
    cores: int,
    processes: int,
    accelerated: bool,
    expected: int,
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(workers, "_seconds", lambda _: seconds)
    count = workers.auto(lambda: None, batches=batches, processes=processes, accelerated=accelerated)
    assert count == expected
    assert len(capsys.readouterr().out.splitlines()) == (expected > 0)


def test_a_first_batch_that_is_slow_by_itself_starts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 0.001])
    monkeypatch.setattr(machine, "cores", lambda: 16)
    monkeypatch.setattr(workers, "_seconds", lambda _: next(times))
    assert workers.auto(lambda: None, batches=1000, processes=1, accelerated=True) == 0
