"""The scale of the paper: recipes that load, and are those of recipes/paper where there are such."""

from pathlib import Path

import pytest

from taipan.experiments import paper_scale
from taipan.experiments.paper_scale import ARCHITECTURES, SIZES, recipe, recipes
from taipan.experiments.registry import ENTRIES
from taipan.training.recipe import Recipe
from tests.command import run

PAPER = Path(__file__).parents[2] / "recipes" / "paper"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recipes_are_those_that_the_repository_has(architecture: str, size: str) -> None:
    assert recipe(architecture, size, f"runs/{architecture}-{size}") == Recipe.load(
        PAPER / f"{architecture}-{size}.yaml"
    )


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.text])
def test_every_experiment_has_recipes_that_can_be_built(name: str, tmp_path: Path) -> None:
    found = list(recipes(name))
    assert len({own.output for own in found}) == len(found) >= 2
    configs = [own.model.config(128_256, 0) for own in found]
    assert len({(config, own.optimizer.learning_rate) for config, own in zip(configs, found, strict=True)}) == len(
        found
    )
    *written, guide = paper_scale.write(name, "A claim", tmp_path)
    assert [Recipe.load(path) for path in written] == found
    text = guide.read_text(encoding="utf-8")
    assert all(f"train {path} --auto-resume" in text for path in written)
    assert all(f"{own.output}/model" in text for own in found)


def test_the_command_writes_and_trains_nothing(tmp_path: Path) -> None:
    done = run("reproduce", "window", "--scale", "paper", "--out", str(tmp_path))
    assert done.code == 0, done.err
    assert "Nothing was trained" in done.err
    assert done.out == (tmp_path / "paper" / "window" / "RUN.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "paper" / "window").iterdir()) == [
        "RUN.md",
        "window-1024.yaml",
        "window-2048.yaml",
        "window-512.yaml",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero-shot", "--scale", "tiny"], "no file of questions was given"),
        (["zero-shot", "--scale", "tiny", "--task", "squad=x"], "is unknown"),
        (["recall", "--scale", "tiny", "--task", "squad"], "must be NAME=FILE"),
        (["recall", "--scale", "tiny", "--task", "squad=a", "--task", "squad=b"], "--task names 'squad' twice"),
        (["model", "taipan-small", "--text", "a=a.txt", "--text", "a=b.txt"], "--text names 'a' twice"),
        (["recall", "--scale", "tiny", "--task", "squad=none.json"], "is no file"),
    ],
)
def test_files_of_questions_are_asked_for(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run("reproduce", *arguments, "--out", str(tmp_path))
    assert done.code != 0
    assert message in " ".join(done.err.split())
