"""The checker of pages is itself checked: each fault is planted once."""

import pytest

from tests.report.accessible import faults

GOOD = """<!doctype html><html lang="en"><svg role="img" aria-labelledby="t" aria-describedby="d">
<title id="t">T</title><desc id="d">D</desc><use href="#t"/></svg>
<div class="scroll" tabindex="0" aria-label="x"><table><caption>c</caption>
<thead><tr><th scope="col">a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table></div></html>"""


def test_a_good_page_has_no_faults() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("what", "instead", "fault"),
    [
        (' role="img"', "", "without role"),
        (' aria-labelledby="t"', "", "without aria-labelledby"),
        (">D<", "><", "without aria-describedby"),
        (' scope="col"', "", "without scope"),
        ("<caption>c</caption>", "", "captions"),
        (' tabindex="0"', "", "keyboard"),
        ('id="d"', 'id="t"', "identifier t 2 times"),
        ("#t", "https://example.org", "leads to"),
        (' lang="en"', "", "language"),
        ("<tbody>", "", "outside the body"),
    ],
)
def test_every_fault_is_found(what: str, instead: str, fault: str) -> None:
    assert any(fault in found for found in faults(GOOD.replace(what, instead)))
