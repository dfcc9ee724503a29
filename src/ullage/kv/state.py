"""What a row holds as tensors by name, to be kept elsewhere, and back. Entries are in the pool's
format on both ways: nothing is rounded twice."""

from collections.abc import Iterable

import torch

from ullage.errors import InputError
from ullage.kv.entries import Entries, bits

State = dict[str, torch.Tensor]
_PARTS = ("keys", "values", "key_scales", "value_scales")  # as in `Entries`


def packed(name: str, pieces: Iterable[Entries]) -> State:
    """Entries, [Hkv, T, D], one piece behind the other; views of a single one."""
    tensors = zip(*(piece.tensors for piece in pieces), strict=True)
    return {f"{name}.{part}": _joined(parts) for part, parts in zip(_PARTS, tensors, strict=False)}


def unpacked(state: State, name: str, count: int, like: Entries) -> Entries:
    """`count` entries that were packed as `name`, of the heads and in the format of `like`; raises
    what `held` does."""
    return Entries(
        *(
            held(state, f"{name}.{part}", mine.dtype, (mine.shape[0], count, *mine.shape[2:]))
            for part, mine in zip(_PARTS, like.tensors, strict=False)
        )
    )


def held(state: State, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of that name.

    Raises:
        InputError: it is missing, or another one than it has to be.
    """
    tensor = state.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
        kind = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise InputError(f"it has no {name} of {kind}.")
    return tensor


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([bits(part) for part in parts], dim=1).view(parts[0].dtype)
