"""The episodic memory of Larimar (arXiv 2403.11901) and its three ways to address it, in fp64.

A fact is a row: a key, which questions are held against, and a value, which they read. The paper
writes Z for both; with a value that is the key itself the equations are the paper's own.
"""

from abc import ABC, abstractmethod

import torch

from ullage.errors import TechniqueError
from ullage.techniques.larimar.rows import Rows

# Of the largest singular value; what is below it is noise. With numpy's own 1e-15 half a percent is
# lost at 16 facts; with 1e-6 a tenth at K facts of a model's hidden states.
RTOL = 1e-10
# Of the recursive update: C_0 is so much of what a key adds to a slot. A read is off by less than
# fp16 rounds, at half as many facts as slots, and so is what is left of one that was forgotten.
DAMPING = 1e-4
ALPHA = 1e-3  # of Gaussian addressing, appendix E


class Memory(ABC):
    """Facts by number. Rows come in any float dtype and are kept, and read, in fp64.

    What is forgotten leaves nothing: the memory is then one that never saw it, up to the rounding
    of its mode.
    """

    def __init__(self) -> None:
        self._rows = Rows()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, fact: int) -> bool:
        return fact in self._rows

    @property
    def facts(self) -> list[int]:
        """The numbers of all facts that are held, in no order."""
        return list(self._rows.facts)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: rows, and what is made of them."""
        return self._rows.nbytes + sum(tensor.nbytes for tensor in self._made())

    def write(self, fact: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold a fact: its key, [C], and its value, [V]. One of that number is forgotten first, so
        that nothing of an old value is left.

        Raises:
            TechniqueError: a key of zeros, a number that is not finite, or a row of another size
                than those that are held.
        """
        key, value = _plain(key), _plain(value)
        self._rows.refuse(key, value)
        if fact in self:
            self.forget(fact)
        self._rows.add(fact, key, value)
        self._wrote(key, value)

    def update(self, fact: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write over a fact that is held.

        Raises:
            TechniqueError: it is not, or as `write` does.
        """
        self._refuse_unknown(fact)
        self.write(fact, key, value)

    def forget(self, fact: int) -> None:
        """
        Raises:
            TechniqueError: no such fact is held.
        """
        self._refuse_unknown(fact)
        self._forgot(*self._rows.take(fact))

    def read(self, queries: torch.Tensor) -> torch.Tensor:
        """What is read for each query: [Q, V] for [Q, C]. Something is, whatever is asked: only a
        gate can tell that nothing is known.

        Raises:
            TechniqueError: no fact is held.
        """
        self._refuse_empty()
        return self._read(_plain(queries))

    def _refuse_unknown(self, fact: int) -> None:
        if fact not in self:
            raise TechniqueError(f"larimar: fact {fact} is not in memory.")

    def _refuse_empty(self) -> None:
        if not len(self):
            raise TechniqueError("larimar: there is no fact in memory to read.")

    @abstractmethod
    def _made(self) -> tuple[torch.Tensor, ...]:
        """What is held beside the rows."""

    @abstractmethod
    def _wrote(self, key: torch.Tensor, value: torch.Tensor) -> None: ...

    @abstractmethod
    def _forgot(self, key: torch.Tensor, value: torch.Tensor) -> None: ...

    @abstractmethod
    def _read(self, queries: torch.Tensor) -> torch.Tensor: ...


class PseudoInverse(Memory):
    """`gpm`: the batch write of section 3. K slots hold K facts exactly, and of more their
    least-squares fit.

    The first read after a change writes all facts again, which takes longer the more there are. A
    read is a projection: of a single fact, by a query that points away from its key, its negative.
    """

    def __init__(self, prior: torch.Tensor) -> None:
        """`prior`: M_0, [K, C]."""
        super().__init__()
        self._inverse_prior = _pinv(_plain(prior))  # [C, K]
        self._slots: tuple[torch.Tensor, ...] = ()

    def _made(self) -> tuple[torch.Tensor, ...]:
        return (self._inverse_prior, *self._slots)

    def _wrote(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._slots = ()

    def _forgot(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._slots = ()

    def _read(self, queries: torch.Tensor) -> torch.Tensor:
        if not self._slots:
            addresses = self._rows.keys @ self._inverse_prior  # W_0 = Z M_0^+, [N, K]
            inverse = _pinv(addresses)
            self._slots = (_pinv(inverse @ self._rows.keys), inverse @ self._rows.values)
        inverse_keys, values = self._slots  # of M = W_0^+ Z: [C, K] of its keys, [K, V]
        return queries @ inverse_keys @ values  # Z_read = W M, W = Z M^+


class Recursive(Memory):
    """`rls`: the sequential equations 3 and 4, alpha +1 to write and -1 to forget, on addresses by
    a fixed reference. Of more than K facts, or of keys that lie close, it reads their least-squares
    fit, each fact by its key of length 1.

    Rounding adds up over writes; `refit` is rid of it. In fp32 it would be wrong from the start.
    """

    def __init__(self, reference: torch.Tensor, damping: float = DAMPING) -> None:
        """`reference`: M^ref, [K, C]. The larger `damping`, the less exact a read, and the less
        rounding counts."""
        super().__init__()
        self._inverse_reference = _pinv(_plain(reference))  # [C, K]
        # what a key of length 1 adds to a slot, on average
        self._damping = damping * self._inverse_reference.square().mean()
        self._empty()

    def refit(self) -> None:
        """Write all facts at once, as if there had never been others."""
        self._empty()
        if len(self):
            lengths = self._rows.keys.norm(dim=1, keepdim=True)
            addresses = self._rows.keys / lengths @ self._inverse_reference  # [N, K]
            self._counts += addresses.T @ addresses
            self._values = _solve(self._counts, addresses.T @ (self._rows.values / lengths))

    def _empty(self) -> None:
        slots = self._inverse_reference.shape[1]
        self._counts = self._damping * torch.eye(slots, dtype=torch.float64)  # C_0
        self._values = torch.zeros(slots, 0, dtype=torch.float64)  # M_0

    def _made(self) -> tuple[torch.Tensor, ...]:
        return (self._inverse_reference, self._counts, self._values)

    def _wrote(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if len(self) == 1:
            self._values = torch.zeros(len(self._counts), len(value), dtype=torch.float64)
        self._step(1, key, value)

    def _forgot(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if len(self):
            self._step(-1, key, value)
        else:
            self._empty()

    def _step(self, alpha: int, key: torch.Tensor, value: torch.Tensor) -> None:
        length = key.norm()  # without it, damping would count for more the shorter a key is
        key, value = key / length, value / length
        address = key @ self._inverse_reference  # W_i = Z_i (M^ref)^+, [K]
        self._counts += alpha * torch.outer(address, address)  # (3)
        gain = _solve(self._counts, address[:, None])  # C_i^-1 W_i^T
        self._values += alpha * gain * (value - address @ self._values)  # (4)

    def _read(self, queries: torch.Tensor) -> torch.Tensor:
        return queries @ self._inverse_reference @ self._values


class Gaussian(Memory):
    """`gauss`: Gaussian addressing, appendix E, where each fact's key is a row of the reference.

    A key lies on its own row, so its address is that row alone: C is diagonal, and equations 3 and
    4 come down to placing a row and taking it away. Forgetting is exact, a write takes as long
    whatever is held, and there is no end of room.
    """

    def nearest(self, queries: torch.Tensor) -> list[int]:
        """The fact whose key is nearest to each of [Q, C].

        Raises:
            TechniqueError: no fact is held.
        """
        self._refuse_empty()
        return [self._rows.facts[row] for row in self._squares(_plain(queries)).argmin(1).tolist()]

    def _made(self) -> tuple[torch.Tensor, ...]:
        return ()

    def _wrote(self, key: torch.Tensor, value: torch.Tensor) -> None:
        pass

    def _forgot(self, key: torch.Tensor, value: torch.Tensor) -> None:
        pass

    def _read(self, queries: torch.Tensor) -> torch.Tensor:
        squares = self._squares(queries)
        least = squares.amin(1, keepdim=True)  # s^2
        # w_k ~ exp(-d_k^2 / (2 alpha s^2)); where s is 0, the rows that lie there share
        further = torch.nan_to_num((squares - least) / (2 * ALPHA * least), nan=0.0)
        return torch.softmax(-further, dim=1) @ self._rows.values

    def _squares(self, queries: torch.Tensor) -> torch.Tensor:
        """Squared distances to all keys, [Q, N]."""
        exact = "donot_use_mm_for_euclid_dist"  # 0 to itself, which a product would round
        return torch.cdist(queries, self._rows.keys, compute_mode=exact).square()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _pinv(matrix: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.pinv(matrix, rtol=RTOL)
    return inverse


def _solve(counts: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """counts^-1 right. Counts are positive definite, but for what rounding does to them."""
    factor, failed = torch.linalg.cholesky_ex(counts)
    solved: torch.Tensor = (
        torch.linalg.solve(counts, right) if failed else torch.cholesky_solve(right, factor)
    )
    return solved
