import pytest
from jinja2 import UndefinedError

from taipan.report.page import render


def test_a_forgotten_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("inspect.html.j2", title="t")
