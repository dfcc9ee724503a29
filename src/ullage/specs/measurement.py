"""What was measured."""

from dataclasses import dataclass

from ullage.specs.workload import PhaseName


@dataclass(frozen=True)
class PeakMeasurement:
    """One run in a fresh process. Bytes are resident memory on CPU, the driver's count elsewhere.

    `runtime_bytes` was held before any weight was read; `phase_peak_bytes` is the high-water mark
    of each phase; `live_bytes` the weights and KV blocks that were alive after the prompt was read,
    when `held_bytes` were held. `first_token_s` counts from the start of the process.
    """

    prompt_tokens: int
    output_tokens: int
    runtime_bytes: int
    phase_peak_bytes: dict[PhaseName, int]
    live_bytes: int
    held_bytes: int
    load_s: float
    first_token_s: float
    decode_tokens_per_second: float

    @property
    def peak_bytes(self) -> int:
        """The highest mark of all phases."""
        return max(self.phase_peak_bytes.values())

    @property
    def slack_bytes(self) -> int:
        """What the allocator keeps beyond what was there before and what is alive."""
        return self.held_bytes - self.runtime_bytes - self.live_bytes
