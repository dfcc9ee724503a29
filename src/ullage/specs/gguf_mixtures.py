"""The file types of llama-quantize: which tensors of a mixture get more bits than its name says.

The rules stand as they do in src/llama-quant.cpp of llama.cpp b11434, for a file without importance
matrix but for the IQ types, which are made with one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

# What llama-quantize calls them: attn_v (q, k and v in one weight too), attn_k, ..., and the ends.
Category = Literal["v", "k", "q", "o", "up", "gate", "down", "embedding", "output", "other"]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the `index`-th of `count`, with `groups` query heads to a KV head, in
    a model of so many `experts`."""

    index: int
    count: int
    groups: int
    experts: int


def _in_the_middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _ends_and_thirds(place: Place) -> bool:
    return not _in_the_middle(place) or (place.index - place.count // 8) % 3 == 2


_WHERE: Mapping[str, Callable[[Place], bool]] = {
    "": lambda place: True,
    "ends and thirds": _ends_and_thirds,
    "middle": _in_the_middle,
    "first eighth": lambda place: place.index < place.count // 8,
    "first sixteenth": lambda place: place.index < place.count // 16,
    "first 2": lambda place: place.index < 2,
    "first 4": lambda place: place.index < 4,
    "4 groups": lambda place: place.groups >= 4,
    "4 groups or experts": lambda place: place.groups >= 4 or place.experts >= 4,
}


@dataclass(frozen=True)
class Mixture:
    """The type of most tensors, and by category others with where they apply, the first that does.
    `output` is the head's, and that of an embedding that serves as one; `of_eight` are those of
    attention in models of 8 experts. The `lowest` have a branch of their own in llama-quantize: it
    counts tensors where others count layers, and knows no 70B."""

    base: str
    rules: Mapping[Category, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    output: str = "Q6_K"
    of_eight: Mapping[Category, str] = field(default_factory=lambda: _EIGHT)
    lowest: bool = False

    def wanted(self, category: Category, place: Place) -> str:
        """The type by the rules, whatever the tensor's shape."""
        rules = self.rules.get(category, ())
        return next((better for better, where in rules if _WHERE[where](place)), self.base)


# Mixtral's attention is small beside its experts.
_EIGHT: Mapping[Category, str] = {"v": "Q8_0", "k": "Q8_0"}
_EIGHT_O: Mapping[Category, str] = {**_EIGHT, "o": "Q5_K"}
_EIGHT_LOWEST: Mapping[Category, str] = {"v": "Q4_K", "k": "Q4_K", "o": "Q5_K"}
_MORE = (("Q6_K", "ends and thirds"),)


def _plain(name: str) -> Mixture:
    return Mixture(name, output=name, of_eight={})


def _lowest(base: str, better: str, embedding: str, output: str) -> Mixture:
    """Of 1 and 2 bits: values, the first layers' down projections and the embedding in `better`
    ones, attention's output in `output`."""
    return Mixture(
        base,
        {
            "v": (("Q4_K", "4 groups or experts"), (better, "")),
            "down": ((better, "first eighth"),),
            "o": ((output, ""),),
            "embedding": ((embedding, ""),),
        },
        output="Q5_K",
        of_eight=_EIGHT_LOWEST,
        lowest=True,
    )


def _ternary(base: str) -> Mixture:
    return Mixture(base, {"embedding": (("Q4_K", ""),)})


MIXTURES: Mapping[str, Mixture] = {
    "fp32": _plain("F32"),
    "bf16": _plain("BF16"),
    "fp16": _plain("F16"),
    "q8_0": Mixture("Q8_0", output="Q8_0"),
    "q6_k": Mixture("Q6_K"),
    "q5_k_m": Mixture("Q5_K", {"v": _MORE, "down": _MORE}),
    "q5_k_s": Mixture("Q5_K"),
    "q5_1": Mixture("Q5_1"),
    "q5_0": Mixture("Q5_0"),
    "q4_k_m": Mixture("Q4_K", {"v": _MORE, "down": _MORE}, of_eight=_EIGHT_O),
    "q4_k_s": Mixture(
        "Q4_K",
        {"v": (("Q5_K", "first 4"),), "down": (("Q5_K", "first eighth"),)},
        of_eight=_EIGHT_O,
    ),
    "q4_1": Mixture("Q4_1"),
    "q4_0": Mixture("Q4_0"),
    "iq4_nl": Mixture("IQ4_NL", {"v": (("Q5_K", "4 groups"),)}, of_eight=_EIGHT_O),
    "iq4_xs": Mixture("IQ4_XS", {"v": (("Q5_K", "4 groups"),)}, of_eight=_EIGHT_O),
    "mxfp4": Mixture("Q8_0", output="Q8_0"),
    "q3_k_l": Mixture(
        "Q3_K", {"v": (("Q5_K", ""),), "down": (("Q5_K", ""),), "o": (("Q5_K", ""),)}
    ),
    "q3_k_m": Mixture(
        "Q3_K",
        {
            "v": (("Q5_K", "first 2"), ("Q4_K", "")),
            "down": (("Q5_K", "first sixteenth"), ("Q4_K", "")),
            "o": (("Q4_K", ""),),
        },
        of_eight=_EIGHT_O,
    ),
    "q3_k_s": Mixture("Q3_K", of_eight=_EIGHT_O),
    "iq3_m": Mixture(
        "IQ3_S",
        {
            "v": (("Q4_K", ""),),
            "down": (("Q4_K", "first eighth"),),
            "o": (("Q4_K", ""),),
        },
        of_eight=_EIGHT_O,
    ),
    "iq3_s": Mixture("IQ3_S", {"v": (("Q4_K", "4 groups"),)}, of_eight=_EIGHT_O),
    "iq3_xs": Mixture(
        "IQ3_S",
        {
            "v": (("Q4_K", "4 groups"),),
            "k": (("IQ3_XXS", ""),),
            "q": (("IQ3_XXS", ""),),
            "gate": (("IQ3_XXS", "middle"),),
            "up": (("IQ3_XXS", "middle"),),
        },
        of_eight=_EIGHT_O,
    ),
    "iq3_xxs": Mixture(
        "IQ3_XXS",
        {
            "v": (("Q4_K", "4 groups"),),
            "k": (("IQ2_S", ""),),
            "q": (("IQ2_S", ""),),
            "o": (("IQ3_S", ""),),
            "embedding": (("IQ3_S", ""),),
        },
        output="Q5_K",
        of_eight=_EIGHT_O,
    ),
    "q2_k": Mixture(
        "Q2_K",
        {
            "v": (("Q4_K", "4 groups"), ("Q3_K", "")),
            "down": (("Q3_K", ""),),
            "o": (("Q3_K", ""),),
        },
        of_eight=_EIGHT_O,
    ),
    "q2_k_s": Mixture("Q2_K", {"v": (("Q4_K", "4 groups"),), "down": (("Q4_K", "first eighth"),)}),
    "iq2_m": _lowest("IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "iq2_s": _lowest("IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "iq2_xs": _lowest("IQ2_XS", "Q2_K", "Q2_K", "IQ2_XS"),
    "iq2_xxs": _lowest("IQ2_XXS", "Q2_K", "Q2_K", "IQ2_XXS"),
    "iq1_m": _lowest("IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "iq1_s": _lowest("IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "tq2_0": _ternary("TQ2_0"),
    "tq1_0": _ternary("TQ1_0"),
}
"""The file types by the names that people use in lower case, the plain ones by ours."""

TERNARY = ("tq2_0", "tq1_0")
"""Those that only models trained to three values a weight bear."""

NARROWER: Mapping[str, str] = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a type becomes whose blocks do not divide a tensor's columns; F16 where this does not
either."""
