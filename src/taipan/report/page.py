"""HTML pages from the package's templates, with everything they need inside."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from taipan.report.palette import DARK, LIGHT

PAPER = "Taipan: Efficient and Expressive State Space Language Models with Selective Attention (arXiv:2410.18572)"
KEYWORDS = ("Taipan", "taipan-lm", "selective attention", "Mamba-2", "state space language model", "long context")


def render(template: str, **values: Any) -> str:
    """One page of `templates/`, self-contained: style, scripts and figures are part of it and nothing is loaded.

    Values are escaped; a missing value is an error (`jinja2.UndefinedError`).
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
