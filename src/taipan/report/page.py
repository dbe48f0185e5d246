"""HTML pages from the package's templates, with everything they need inside."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """One page of `templates/`, self-contained: style, scripts and figures are part of it and nothing is loaded.

    Values are escaped; a value the template names and the caller forgot is an error (`jinja2.UndefinedError`).
    """
    environment = Environment(
        loader=PackageLoader("taipan.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
