"""The models in the box are whole, small, described, and say what their card says."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import taipan
from taipan.config import TaipanConfig
from taipan.evaluation import TextDocuments
from taipan.evaluation.perplexity import evaluate
from taipan.model.weights import PRECISE
from taipan.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
MODELS = taipan.shipped_models()
# bits per byte of LICENSE, which is on every machine; what the weights said when they were made
LICENCE_TEXT = {"taipan-small": 1.8370}


def test_the_link_in_the_clone_leads_to_them() -> None:
    assert tuple(LICENCE_TEXT) == MODELS
    for name in MODELS:
        assert (ROOT / "models" / name).samefile(taipan.model_directory(name))


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small_and_in_bfloat16(name: str) -> None:
    path = taipan.model_directory(name) / "model.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            wanted = torch.float32 if key.endswith(PRECISE) else torch.bfloat16
            assert file.get_tensor(key).dtype == wanted, key


@pytest.mark.parametrize("name", MODELS)
def test_they_come_with_recipe_log_card_and_licences(name: str) -> None:
    directory = taipan.model_directory(name)
    config = TaipanConfig.from_json_file(directory / "config.json")
    own, ours = (Recipe.load(path) for path in (directory / "recipe.yaml", ROOT / "recipes" / f"{name}.yaml"))
    assert config == own.model.config(config.vocab_size, config.eos_token_id)
    assert config == ours.model.config(config.vocab_size, config.eos_token_id)
    assert (own.data, own.optimizer) == (ours.data, ours.optimizer)
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["kind"] == "final"
    assert own.training.tokens == pytest.approx(log[-1]["tokens"], rel=0.001)
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert f"{log[-1]['tokens']:,}" in card
    for licence in ("GFDL", "CC BY-SA", "CC0", "PSF"):
        assert licence in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "taipan"


@pytest.mark.parametrize("name", MODELS)
def test_the_card_says_what_was_measured_of_these_weights(name: str) -> None:
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert results["more"]["fingerprint"] == taipan.load(name).model.fingerprint
    card = (taipan.model_directory(name) / "README.md").read_text(encoding="utf-8")
    (found,) = results["results"][name]
    whole = {key.removesuffix(", whole"): part["measured"] for key, part in found.items() if key.endswith(", whole")}
    assert "enwik8" in whole
    assert whole["enwik8"]["bytes"] == 5_000_000
    for text, values in whole.items():
        assert re.search(rf"\| {text} .*\| {values['bits_per_byte']:.3f} \|", card), text


@pytest.mark.parametrize("name", MODELS)
def test_they_predict_as_they_did_when_they_were_made(name: str) -> None:
    loaded = taipan.load(name)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    result = evaluate(loaded.model, TextDocuments([text], loaded.tokenizer))
    assert result.bits_per_byte == pytest.approx(LICENCE_TEXT[name], rel=0.005)
    assert 0.05 < result.gates[0].rate < 0.35  # the first tokens of a document compete with none
