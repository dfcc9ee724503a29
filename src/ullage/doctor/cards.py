"""The card that a log names, by the catalog's name."""

from ullage.doctor.log import Log
from ullage.specs.device import catalog_name

WORDS = ("compute capability", "using device", "memory breakdown", " - CUDA", "device_name=")

_NAMED = (
    r"Device \d+: (?P<word>[^,]{1,60}),",  # ggml's start
    r"using device \w+ \((?P<word>[^)]{1,60})\)",
    r"- (?:CUDA|ROCm|Vulkan)\d+ : (?P<word>[^(]{1,60}) \(",  # llama.cpp's list
    r"\| - \w+ \((?P<word>[^)]{1,60})\) \|",  # and its table
    r"device_name=(?P<word>[\w-]{1,60})",  # vLLM's and SGLang's files of kernel settings
)


def card_of(log: Log) -> str:
    """The card of the catalog that the log names; "" where it names none, or several."""
    named = {
        catalog_name(found.text("word")) for pattern in _NAMED for found in log.every(pattern)
    } - {""}
    return named.pop() if len(named) == 1 else ""
