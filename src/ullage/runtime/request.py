"""What the engine is asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ullage.errors import PromptError
from ullage.kv.cache import Start
from ullage.runtime.temperature import refuse_temperature

OnPrefill = Callable[[int, int], None]  # tokens read, tokens of the prompt


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it. `temperature` 0 takes the likeliest token each time.
    `start`: what was read before the prompt, which stays as it is. `about_ids`: what says which
    fact the prompt is about, where that is not all of it: the user's words in a chat template.

    Raises:
        PromptError: no prompt, or no new token.
        InputError: a temperature that no token can be drawn at.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    on_prefill: OnPrefill | None = None
    start: Start | None = None
    about_ids: list[int] | None = None
    output_ids: list[int] = field(default_factory=list)
    finished: bool = False
    broken: bool = False  # by a step that failed, perhaps for another request's sake

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise PromptError("The prompt is empty: there is nothing to go on from.")
        if self.max_new_tokens < 1:
            raise PromptError("Ask for one new token at least.")
        refuse_temperature(self.temperature)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the sequence holds at its full length."""
        read_tokens = 0 if self.start is None else self.start.length
        return read_tokens + len(self.prompt_ids) + self.max_new_tokens
