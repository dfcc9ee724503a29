"""Read a config.json's values as what they must be. A value that cannot be true is an error, and
an absent one takes the default of the transformers config class, or is an error too."""

from collections.abc import Collection, Mapping
from typing import Any

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture

LARGEST_SIZE = 1 << 31


class Config:
    """One model's config with its family's `defaults` and `spelling` (GPT-2 says ``n_embd``)."""

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        spelling: Mapping[str, str],
    ) -> None:
        self._values = values
        self._defaults = defaults
        self._spelling = spelling

    def get(self, key: str) -> Any:
        """The value as written, else the family's default, else None."""
        return self._values.get(self.spell(key), self._defaults.get(key))

    def spell(self, key: str) -> str:
        """What this family's config.json calls `key`."""
        return self._spelling.get(key, key)

    def either(self, *keys: str) -> str:
        """The first of `keys` that the config or the family's defaults have, else the first."""
        return next((key for key in keys if self.get(key) is not None), keys[0])

    def size(self, key: str, largest: int = LARGEST_SIZE) -> int:
        """A positive count that must be there.

        Raises:
            ModelError: absent, no integer, or outside 1..`largest`.
        """
        value = self.optional_size(key, largest)
        if value is None:
            raise ModelError(f"The model's config has no {self.spell(key)!r}: is it complete?")
        return value

    def optional_size(self, key: str, largest: int = LARGEST_SIZE) -> int | None:
        """A positive count, or None where the config says null or nothing.

        Raises:
            ModelError: no integer, or outside 1..`largest`.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise self._wrong(key, f"an integer from 1 to {largest}")
        return value

    def count(self, key: str, largest: int = LARGEST_SIZE) -> int:
        """A number of things that may be none; 0 where the config says null or nothing.

        Raises:
            ModelError: no integer, or outside 0..`largest`.
        """
        value = self.get(key)
        nothing = value is None or (type(value) is int and value == 0)
        return 0 if nothing else self.size(key, largest)

    def names(self, key: str, count: int, known: Collection[str]) -> list[str] | None:
        """A list of `count` of the `known` words, a layer each, or None.

        Raises:
            ModelError: another length, or something else in it.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(name, str) and name in known for name in value
        ):
            raise self._wrong(key, f"a list of {', '.join(known)}")
        if len(value) != count:
            raise ModelError(
                f"The model's config has {len(value)} {self.spell(key)} for {count} layers."
            )
        return value

    def numbers(self, key: str, most: int) -> list[int]:
        """At most `most` integers that are not negative; none where there is no such key.

        Raises:
            ModelError: something else.
        """
        value = self.get(key)
        if value is None:
            return []
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(type(number) is int and 0 <= number <= LARGEST_SIZE for number in value)
        ):
            raise self._wrong(key, f"a list of at most {most} counts")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """The object under `key`, empty where the config says null or nothing.

        Raises:
            ModelError: something else.
        """
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false where the config says null or nothing and the family has no default.

        Raises:
            ModelError: something else.
        """
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None.

        Raises:
            ModelError: something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise self._wrong(key, "a positive number")
        return float(value)

    def _wrong(self, key: str, wanted: str) -> ModelError:
        shown = repr(self.get(key))[:60]
        return ModelError(
            f"The model's config says {self.spell(key)} = {shown}; it must be {wanted}."
        )


def refuse_foreign(config: Mapping[str, Any], family: str, native_classes: tuple[str, ...]) -> None:
    """Refuse a config whose model is not the one that transformers itself has for `family`.

    Raises:
        CheckpointError: the model runs code from its own repository.
        UnknownArchitecture: a class of the family that is no plain causal language model.
        ModelError: a config that is garbled.
    """
    remote_class = remote_code_class(config)
    if remote_class is not None and remote_class not in native_classes:
        raise CheckpointError(
            f"The model's class {remote_class[:60]!r} is code in its own repository "
            "(trust_remote_code), which ullage never executes. "
            f"The native class is {native_classes[0]}."
        )
    architectures = config.get("architectures") or [native_classes[0]]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ModelError(
            "The model's config says architectures = something that is no list of names."
        )
    if architectures[0] not in native_classes:
        raise UnknownArchitecture(
            f"There is no arithmetic for the class {architectures[0][:60]!r}, and ullage does not "
            f"guess: of the {family} family only {native_classes[0]} is known."
        )


def remote_code_class(config: Mapping[str, Any]) -> str | None:
    """The causal-LM class that `auto_map` asks to run from the model's own repository, or None.

    Raises:
        ModelError: `auto_map` is garbled.
    """
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ModelError("The model's config says auto_map = something that is no object.")
    target = auto_map.get("AutoModelForCausalLM")
    return None if target is None else str(target).rsplit(".", 1)[-1]
