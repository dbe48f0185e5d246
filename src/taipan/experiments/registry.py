"""The experiments that `taipan reproduce` knows by id; what runs them is imported when one is asked for."""

import importlib
from collections.abc import Callable
from typing import Any

CLAIMS: dict[str, str] = {
    "gate-settings": "How much of attention's lead each setting of the gate keeps, between Mamba-2 and Jamba",
    "perplexity-by-context": "Loss by context and position, four architectures",
    "copying": "Loss of tokens that repeat a bigram, by distance, and of all others, four architectures",
    "capacity": "Loss by the budget C, and tokens chosen blindly at the same budget",
    "positions": "A SAL with rotary embedding and without, inside the training length and beyond",
    "window": "How long the window of a SAL has to be",
    "scope": "Keys of all or of selected tokens, a window of positions or of selected tokens",
    "ratio": "How many SALs there are and where they stand",
    "gate": "What the gate selects",
    "failures": "Gates that fail, each provoked, and when training warns of them",
}
"""Of every experiment on language, what it shows."""

_MODULES = {
    "gate-settings": "gate_settings",
    "perplexity-by-context": "reading",
    "copying": "reading",
    "gate": "reading",
}


def experiment(name: str) -> Callable[[Any], Any]:
    """What runs the experiment of an id: from a `Laboratory` to an `Outcome`."""
    module = importlib.import_module(f"taipan.experiments.{_MODULES.get(name, 'comparisons')}")
    return module.EXPERIMENTS[name]
