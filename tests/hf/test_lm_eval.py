"""The evaluation harness on the Hugging Face face: it reads all of every prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from taipan import TaipanLM
from taipan.config import READABLE
from taipan.data.tokenizer import Tokenizer
from taipan.hf import TaipanForCausalLM
from tests.models import small_model

LONG = "In the beginning was a word that decides the end. " * 60 + "And so"  # 3,006 tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256).save_pretrained(directory, Tokenizer.bytes())
    return directory


def harness(directory: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return HFLM(pretrained=TaipanForCausalLM.from_pretrained(directory), tokenizer=tokenizer, batch_size=1)


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_length_is_said_in_the_configuration_and_in_the_tokenizer(directory: Path) -> None:
    assert AutoTokenizer.from_pretrained(directory).model_max_length == READABLE
    assert TaipanForCausalLM.from_pretrained(directory).config.max_position_embeddings == READABLE
    assert harness(directory).max_length == READABLE
    shorter = TaipanForCausalLM.from_pretrained(directory, max_position_embeddings=100)  # for who wants to be cut
    assert HFLM(pretrained=shorter, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=1).max_length == 100


def test_nothing_of_a_long_prompt_is_cut(directory: Path) -> None:
    """Every call of the model gets all of it, and gives what the native model gives."""
    lm, model, tokenizer = harness(directory), TaipanLM.from_pretrained(directory), Tokenizer.bytes()
    lengths: list[int] = []
    lm.model.model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))

    def nats(text: str, answer: str) -> float:
        ids = torch.tensor([tokenizer.encode(text + answer)])
        logits = model(ids).logits[0].log_softmax(-1)
        return sum(
            float(logits[place - 1, ids[0, place]]) for place in range(len(tokenizer.encode(text)), ids.shape[1])
        )

    ((seen, _),) = lm.loglikelihood([request("loglikelihood", LONG, " it")])
    assert seen == pytest.approx(nats(LONG, " it"), rel=1e-4)
    assert lengths == [len(LONG) + 2]  # all but the last byte of the answer
    (rolled,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", LONG)])
    whole = torch.tensor([[256, *tokenizer.encode(LONG)]])
    assert rolled == pytest.approx(-float(model(whole, labels=whole).cross_entropy) * len(LONG), rel=1e-4)
    assert lengths[1:] == [len(LONG)]
    (text,) = lm.generate_until([request("generate_until", LONG, {"until": ["\n"], "max_gen_toks": 8})])
    ids = model.generate(torch.tensor([tokenizer.encode(LONG)]), max_new_tokens=8, do_sample=False)[0, len(LONG) :]
    assert text == tokenizer.decode(ids.tolist()).split("\n")[0]
    assert lengths[2] == len(LONG)
