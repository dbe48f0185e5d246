"""HTML pages from the package's templates, with everything they need inside."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from taipan.io import path_text
from taipan.report.palette import DARK, LIGHT

PAPER = "Taipan: Efficient and Expressive State Space Language Models with Selective Attention (arXiv:2410.18572)"
KEYWORDS = ("Taipan", "taipan-lm", "selective attention", "Mamba-2", "state space language model", "long context")


def render(template: str, **values: Any) -> str:
    """One page of `templates/`, self-contained: style, scripts and figures are part of it and nothing is loaded.

    Values are escaped; a value the template names and the caller forgot is an error (`jinja2.UndefinedError`).
    """
    shared = {"light": LIGHT.variables, "dark": DARK.variables, "paper": PAPER, "keywords": KEYWORDS}
    return _environment().get_template(template).render(**shared, **values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("taipan.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def shareable(path: str | Path) -> str:
    """A path as a page may show it: as it was given, or only its last part where it tells of this machine.

    A page is sent to others; where its files lay on this machine is not their business.
    """
    given = Path(path)
    if given.is_absolute() or ".." in given.parts:
        return path_text(given.name if given.name not in ("", "..") else given.resolve().name)
    return path_text(given)
