from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from taipan.data.tokenizer import END_OF_TEXT, Tokenizer
from tests.models import small_model

# the name of the end token is text, too
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=20) | st.just(END_OF_TEXT), max_size=4).map("".join)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    text = "def forward(self, tokens):\n    return self.head(self.decoder(tokens))\n\n\n# naïve — 1234 tokens\n"
    native = Tokenizer.bytes() if request.param == "bytes" else Tokenizer.train_bpe([text] * 3, 300)
    small_model("mamba2", vocab_size=native.vocab_size, eos_token_id=native.eos_id).save_pretrained(directory, native)
    return native, directory


def face(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def test_the_tokenizer_beside_a_native_model_is_found(both: tuple[Tokenizer, Path]) -> None:
    native, directory = both
    tokenizer = face(directory)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (native.eos_token, native.eos_id)
    assert len(tokenizer) == native.vocab_size


def test_any_text_has_the_same_ids_and_comes_back(both: tuple[Tokenizer, Path]) -> None:
    native, directory = both
    tokenizer = face(directory)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def same(text: str) -> None:
        ids = tokenizer(text).input_ids
        assert ids == native.encode(text)
        assert native.eos_id not in ids
        assert tokenizer.decode(ids) == text

    same()


def test_a_padded_batch_is_what_the_model_reads(both: tuple[Tokenizer, Path]) -> None:
    _, directory = both
    tokenizer = face(directory)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0, -1] == 1
    assert batch["attention_mask"][0, 0] == 0


def test_saved_by_transformers_it_is_still_ours(both: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    native, directory = both
    face(directory).save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.eos_id == native.eos_id
    text = f"def f(x):\n    return {END_OF_TEXT}"
    assert again.encode(text) == native.encode(text) == face(tmp_path)(text).input_ids
