"""Random numbers for a whole batch at once, each a function of what it is for and of nothing else.

A picture's key follows from (seed, epoch, index), and its n-th number for a purpose from the key, the purpose and n:
it does not matter which batch, worker or rank asks, nor what was asked before. The numbers are those of SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with the constants of Vigna's
splitmix64.c), which hashes a counter and so is computed for all pictures side by side.
"""

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15
"""The counter's step: 2**64 over the golden ratio, made odd."""
_MASK = 2**64 - 1
_EPOCHS, _INDICES = 2**24, 2**40
"""An epoch and an index share one word of 64 bits."""


def keys(seed: int, epochs: npt.NDArray[np.int64] | int, indices: npt.NDArray[np.int64]) -> Keys:
    """A key for each picture, uint64 [B], by its epoch (or the number of its copy) and its index, int64 [B]."""
    assert np.max(epochs, initial=0) < _EPOCHS
    assert np.max(indices, initial=0) < _INDICES
    word = np.asarray(epochs).astype(np.uint64) * np.uint64(_INDICES) + indices.astype(np.uint64)
    return _mixed(word + _hashed(seed))


class Draws:
    """The random numbers of one purpose for pictures with those keys; each call takes the next ones.

    Args:
        purpose: such as a transform's name. What else is drawn for a picture does not change these numbers.
    """

    def __init__(self, keys: Keys, purpose: str) -> None:
        self._keys, self._purpose, self._taken = keys, purpose, 0
        self._start = keys ^ _hashed(zlib.crc32(purpose.encode()))

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, members: npt.NDArray[np.int64]) -> "Draws":
        """From the first number on again, for some of the pictures."""
        return Draws(self._keys[members], self._purpose)

    def words(self, count: int) -> Keys:
        """Uniform words of 64 bits, uint64 [count, B]."""
        numbers = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        self._taken += count
        return _mixed(self._start + numbers[:, None])

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Uniform numbers in [0, 1), float64 [count, B]."""
        return (self.words(count) >> np.uint64(11)) * np.float64(2.0**-53)

    def chosen(self, p: float) -> npt.NDArray[np.int64]:
        """Which pictures something of probability `p` happens to, int64 [at most B], ascending."""
        if p == 1:
            self._taken += 1  # what follows does not depend on p
            return np.arange(len(self))
        (drawn,) = self.uniform(1)
        return np.flatnonzero(drawn < p)


def _mixed(word: Keys) -> Keys:
    """SplitMix64's finaliser, a one-to-one map of words whose every bit depends on all the bits that come in."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@lru_cache(maxsize=64)
def _hashed(number: int) -> np.uint64:
    word: np.uint64 = _mixed(np.array([(number + 1) * _GAMMA & _MASK], dtype=np.uint64))[0]
    return word
