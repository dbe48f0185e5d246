import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from taipan.data.tokenizer import END_OF_TEXT, Tokenizer
from taipan.errors import DataError
from taipan.model import load_tokenizer
from tests.models import small_model
from tests.tokenizers import BACKENDS
from tests.tokenizers import TEXTS as TEXTS_OF_ALL

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
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert ids == native.encode(text)
        assert native.eos_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(text).input_ids == native.encode_template(text)

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
    assert again.encode(text) == native.encode(text) == face(tmp_path)(text, split_special_tokens=True).input_ids
    assert again.encode_template(text) == face(tmp_path)(text).input_ids


TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_chat_template_has_real_tokens_in_both_faces(both: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    """A tuned model could never learn to stop where the end of a turn is letters."""
    native, directory = both
    tokenizer = face(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a name\n"}, {"role": "assistant", "content": "naïve"}]
    again, reread = face(tmp_path), Tokenizer.load(tmp_path)
    text = again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    user, assistant = again.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    first, second = native.encode("a name\n"), native.encode("naïve")
    assert ids == [user, *first, native.eos_id, assistant, *second, native.eos_id, assistant]
    assert isinstance(text, str)
    assert reread.encode_template(text) == ids
    assert not {user, assistant, native.eos_id} & {*reread.encode(text)}


def test_an_end_that_a_trainer_puts_behind_a_text_is_a_token(both: tuple[Tokenizer, Path]) -> None:
    """As TRL's SFT does it: the name of the end is joined to the text, and the whole is encoded."""
    native, directory = both
    tokenizer = face(directory)
    assert tokenizer(text=f"a name{tokenizer.eos_token}").input_ids == [*native.encode("a name"), native.eos_id]


def with_template(end: bool) -> Tokenizer:
    """Bytes with a beginning token that a post-processor adds, and an end token if it is to."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    backend.add_special_tokens(["<s>"])
    special: list[tuple[str, int]] = [("<s>", 257), (END_OF_TEXT, 256)]
    single = f"<s> $A {END_OF_TEXT}" if end else "<s> $A"
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    return Tokenizer(backend)


@pytest.mark.parametrize("end", [False, True])
def test_a_template_of_a_foreign_tokenizer_adds_nothing_in_either_face(end: bool, tmp_path: Path) -> None:
    native = with_template(end)
    model = small_model("mamba2", vocab_size=258, eos_token_id=256)
    model.save_pretrained(tmp_path, native)
    assert face(tmp_path)("hi").input_ids == [104, 105] == native.encode("hi")
    assert load_tokenizer(tmp_path, model.config).encode("hi") == [104, 105]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"] is None, "the choice can be seen"
    face(tmp_path).save_pretrained(tmp_path)
    assert face(tmp_path)("hi").input_ids == [104, 105] == load_tokenizer(tmp_path).encode("hi")


def test_two_encodings_of_one_text_are_refused(tmp_path: Path) -> None:
    model = small_model("mamba2", vocab_size=258, eos_token_id=256)
    model.save_pretrained(tmp_path)
    backend = json.loads(with_template(False).to_json())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for step in (template, {"type": "Sequence", "processors": [level, template]}):  # as Llama 3 has it
        (tmp_path / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": step}))
        assert face(tmp_path)("hi").input_ids == [257, 104, 105]
        with pytest.raises(DataError, match=r"one text would have two encodings.*\.save\("):
            load_tokenizer(tmp_path, model.config)
        Tokenizer.load(tmp_path).save(tmp_path)  # as the message advises
        assert load_tokenizer(tmp_path, model.config).encode("hi") == [104, 105] == face(tmp_path)("hi").input_ids


@pytest.mark.parametrize("name", BACKENDS)
def test_a_text_has_one_encoding_with_any_kind_of_tokenizer(name: str, tmp_path: Path) -> None:
    backend, end = BACKENDS[name]()
    native = Tokenizer(backend, end)
    small_model("mamba2", vocab_size=native.vocab_size, eos_token_id=native.eos_id).save_pretrained(tmp_path, native)
    for text in TEXTS_OF_ALL[:3]:
        assert face(tmp_path)(text).input_ids == native.encode(text)
    text = f"It waits {end}"
    assert face(tmp_path)(text).input_ids == native.encode_template(text)
