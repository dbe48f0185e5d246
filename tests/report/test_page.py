import numpy as np
import pytest
from jinja2 import UndefinedError

from taipan.report.page import render
from taipan.report.selection import LayerSelection, selection_view


def test_a_forgotten_value_is_an_error() -> None:
    layer = LayerSelection(layer=0, selected_T=np.ones(1, bool), margin_T=np.ones(1), capacity=0.1, threshold=0.0)
    view = selection_view(["a"], [layer], vocabulary=257)
    words = {"title": "t", "version": "0", "made": "", "source": "s", "model": "m", "command": "c"}
    values = {**words, "view": view, "margin_figure": None}
    assert "<title>t</title>" in render("inspect.html.j2", **values)
    for name in values:
        with pytest.raises(UndefinedError):
            render("inspect.html.j2", **{key: value for key, value in values.items() if key != name})
