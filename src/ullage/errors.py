"""Everything ullage raises for a reason its user can act on.

    UllageError                     exit code 2
    ├── InputError                  what was typed or pointed at cannot be used
    │   ├── SizeError               "12parsecs" is not a size
    │   ├── ModelError              the model's folder, config or header is missing or broken
    │   │   ├── UnknownArchitecture     no arithmetic for this family: never a guess
    │   │   └── CheckpointError         weights that cannot or must not be read
    │   ├── UnknownDevice           no such name in the device catalog
    │   ├── TechniqueError          unknown technique, bad setting, unsupported model
    │   ├── PromptError             empty, or longer than the model's context
    │   ├── FactError               a fact that cannot be written, or that contradicts another
    │   └── LedgerError             a ledger of facts that cannot be read or written
    ├── DoesNotFit                  exit code 1: the budget cannot work; says which would
    └── BudgetExceeded              exit code 1: a run would have passed its budget and was stopped

Every message is one or two lines that say what is wrong and what to do. The command line prints the
message and exits with `exit_code`; it never prints a traceback for these.
"""


class UllageError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 2


class InputError(UllageError):
    """Something that was typed or pointed at cannot be used."""


class SizeError(InputError):
    """A size or a token count that does not parse."""


class ModelError(InputError):
    """A model's folder, config or header is missing or broken."""


class UnknownArchitecture(ModelError):
    """A model family that ullage has no arithmetic for."""


class CheckpointError(ModelError):
    """Weights that cannot be read, or that must not be (pickle, remote code)."""


class UnknownDevice(InputError):
    """A device name that the catalog does not hold."""


class TechniqueError(InputError):
    """An unknown technique, a bad setting of one, or a model that it does not support."""


class PromptError(InputError):
    """A prompt that is empty or longer than the model's context."""


class FactError(InputError):
    """A fact that cannot be written: empty, too long, without a subject, or against another."""


class LedgerError(InputError):
    """A ledger of facts that cannot be read or written: no ledger, another model's, damaged, in
    use, read-only, or on a full disk."""


class DoesNotFit(UllageError):
    """A budget that cannot work. `needed_bytes` is the smallest that would."""

    exit_code = 1

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class BudgetExceeded(UllageError):
    """A run that would have passed its byte budget and was stopped before it did."""

    exit_code = 1
