"""Trained models that come with the package, found by name.

They are model directories like any other, in `taipan/models/` (`models/` in a clone is a link to it). Whatever takes a
model directory takes their names too.
"""

from pathlib import Path

_DIRECTORY = Path(__file__).parent / "models"
_CONFIG = "config.json"


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in _DIRECTORY.glob(f"*/{_CONFIG}")))


def model_directory(model: str | Path) -> Path:
    """Where a model is.

    Args:
        model: the path of a model directory, or the name of a model that comes with the package. A directory of that
            name, where there is one, comes first.

    Returns:
        The path as it was given, whether something is there or not; or the directory of the model of that name.
    """
    path = Path(model)
    return _DIRECTORY / path if str(path) in shipped_models() and not path.exists() else path
