"""A plan as the command, the code or the YAML of an engine: one engine, one file. The folder is the
registry: adding an engine is adding a module here with one function, ``export(plan) -> str``."""

import importlib
import pkgutil

from ullage.errors import InputError
from ullage.specs.plan import Plan

__all__ = ["export", "names"]


def names() -> list[str]:
    """What a plan can be exported to: the files of this folder (its packages are what they
    share), with ``llama_cpp`` spelled as its engine is."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name.replace("_", ".") for name in modules)


def export(plan: Plan, target: str) -> str:
    """The plan for `target`, with a comment why each thing is set.

    Raises:
        InputError: no such target, or one that cannot do what is planned.
    """
    if target not in names():
        raise InputError(f"No exporter is called {target[:60]!r}. There is: {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{target.replace('.', '_')}")
    text: str = module.export(plan)
    return text
