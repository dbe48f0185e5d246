"""The page that a server shows."""

from taipan.report.page import render


def serving_page(model: str, version: str) -> str:
    """The page at `/` of `taipan serve`: read a document, ask it, see what the gates selected, fork.

    Args:
        model: its name in requests.
        version: of this package.
    """
    return render("serve.html.j2", title=f"{model}: read once, ask often", model=model, version=version, made="")
