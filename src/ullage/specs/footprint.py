"""Footprint: the bytes of one phase, by part."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one phase: `activation_bytes` holds scratch too, `overhead_bytes` the runtime
    (interpreter, libraries, device context)."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    overhead_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.activation_bytes
            + self.logits_bytes
            + self.overhead_bytes
        )
