"""Random numbers: the same whoever asks, never the same for two purposes, and uniform."""

import numpy as np
import pytest
from scipy import stats

from pipeline.data.draws import Draws, keys


def test_the_first_numbers_are_those_of_the_published_generator() -> None:
    """Vigna's splitmix64.c from the state 0; a key of its own purpose stands for that state."""
    key = Draws(np.zeros(1, np.uint64), "x")._start  # what makes the purpose's state 0
    words = Draws(key, "x").words(3)[:, 0]
    assert [int(word) for word in words] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_picture_draws_the_same_whatever_batch_it_is_in() -> None:
    whole = Draws(keys(7, np.full(50, 3), np.arange(50)), "shift").uniform(4)
    shuffled = np.random.default_rng(0).permutation(50)[:20]
    some = Draws(keys(7, np.full(20, 3), shuffled), "shift")
    assert np.array_equal(some.uniform(4), whole[:, shuffled])
    assert np.array_equal(some.of(np.array([5, 2])).uniform(4), whole[:, shuffled[[5, 2]]])
    one_by_one = Draws(keys(7, 3, np.array([11])), "shift")
    assert [float(one_by_one.uniform(1)[0, 0]) for _ in range(4)] == whole[:, 11].tolist()


def test_no_key_and_no_number_is_drawn_twice() -> None:
    epochs, indices = (grid.ravel() for grid in np.meshgrid(np.arange(200), np.arange(500)))
    made = np.concatenate([keys(seed, epochs, indices) for seed in range(3)])
    assert len(np.unique(made)) == len(made)
    words = np.concatenate([Draws(made, purpose).words(3).ravel() for purpose in ("shift", "rotate")])
    assert len(np.unique(words)) == len(words)  # of 1.8 million, two alike have a chance of 1 in 10 million


@pytest.mark.parametrize("along", ["pictures", "epochs", "seeds", "numbers"])
def test_numbers_are_uniform_and_neighbours_have_nothing_in_common(along: str) -> None:
    """Kolmogorov-Smirnov on 20,000 numbers, and their correlation with the next one's (standard deviation 0.007)."""
    count = 20_000
    steps = np.arange(count)
    nothing = np.zeros(count, dtype=np.int64)
    drawn = {
        "pictures": lambda: Draws(keys(0, nothing, steps), "shift").uniform(1)[0],
        "epochs": lambda: Draws(keys(0, steps, nothing), "shift").uniform(1)[0],
        "seeds": lambda: np.concatenate(
            [Draws(keys(seed, 0, np.zeros(1, np.int64)), "shift").uniform(1)[0] for seed in range(count)]
        ),
        "numbers": lambda: Draws(keys(0, 0, np.zeros(1, np.int64)), "shift").uniform(count)[:, 0],
    }[along]()
    assert 0 <= drawn.min() < 0.001
    assert 0.999 < drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.028


def test_what_is_chosen_is_chosen_at_its_rate() -> None:
    made = keys(0, 0, np.arange(10_000))
    assert len(Draws(made, "x").chosen(0.0)) == 0
    assert np.array_equal(Draws(made, "x").chosen(1.0), np.arange(10_000))
    assert len(Draws(made, "x").chosen(0.3)) == pytest.approx(3000, abs=4 * 46)
    after = []
    for p in (0.0, 0.3, 1.0):
        draws = Draws(made, "x")
        draws.chosen(p)
        after.append(draws.uniform(1))
    assert np.array_equal(after[0], after[1])
    assert np.array_equal(after[1], after[2])  # a phase's strength changes which pictures, and not how
