"""The experiments that `taipan reproduce` knows by id; what runs them is imported when one is asked for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """An experiment.

    Attributes:
        claim: what it shows.
        module: of `taipan.experiments`, in whose `EXPERIMENTS` it is.
        text: whether its models are trained on text.
        files: names of the local files of questions that it asks.
        long: whether it reads long texts of the reader.
        timed: whether it measures times and memory, which only the machine at hand can tell.
    """

    claim: str
    module: str
    text: bool = True
    files: tuple[str, ...] = ()
    long: bool = False
    timed: bool = False


ENTRIES: dict[str, Entry] = {
    "gate-settings": Entry(
        "How much of attention's lead each setting of the gate keeps, between Mamba-2 and Jamba", "gate_settings"
    ),
    "learning-rates": Entry("Which learning rate is best, four architectures", "learning_rates"),
    "perplexity-by-context": Entry("Loss by context and position, four architectures", "reading", long=True),
    "latency-by-length": Entry(
        "Time and memory of generation and prefill by length, four architectures", "latency", timed=True
    ),
    "copying": Entry(
        "Loss of tokens that repeat a bigram, by distance, and of all others, four architectures", "reading"
    ),
    "recall": Entry(
        "Answers found in documents, and keys hidden in text, four architectures",
        "tasks",
        files=("swde", "fda", "squad"),
    ),
    "zero-shot": Entry(
        "Accuracy on nine tasks, with intervals, four architectures",
        "tasks",
        files=(
            *("winogrande", "piqa", "hellaswag", "arc-easy", "arc-challenge"),
            *("openbookqa", "truthfulqa", "race", "boolq"),
        ),
    ),
    "retention": Entry(
        "Keys asked for up to a million tokens after they were stated, by what leaves the window",
        "retention",
        text=False,
    ),
    "mqar": Entry("Multi-query associative recall as zoology sets it, by size of state", "mqar", text=False),
    "capacity": Entry("Loss by the budget C, and tokens chosen blindly at the same budget", "comparisons"),
    "positions": Entry("A SAL with rotary embedding and without, inside the training length and beyond", "comparisons"),
    "window": Entry("How long the window of a SAL has to be", "comparisons"),
    "scope": Entry("Keys of all or of selected tokens, a window of positions or of selected tokens", "comparisons"),
    "ratio": Entry("How many SALs there are and where they stand", "comparisons"),
    "gap": Entry("The share selected in training and at inference, and what makes them one", "comparisons"),
    "gate": Entry("What the gate selects", "reading"),
    "failures": Entry("Gates that fail, each provoked, and when training warns of them", "comparisons"),
}
"""Every experiment but `associative-recall`, which has a command of its own."""


def experiment(name: str) -> Callable[[Any], Any]:
    """What runs the experiment of an id: from a `Laboratory` to an `Outcome`."""
    module = importlib.import_module(f"taipan.experiments.{ENTRIES[name].module}")
    return module.EXPERIMENTS[name]
