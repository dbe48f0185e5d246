"""`generate` of transformers on Taipan: what works gives what it should, what cannot work says so."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError, StateError
from taipan.hf import TaipanCache, TaipanForCausalLM
from taipan.text import load
from tests.hf.models import pair, saved
from tests.models import STACKS, random_tokens, small_model


def generated(face: TaipanForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    out = face.generate(tokens, **options)
    assert isinstance(out, Tensor)
    return out


def with_logits(face: TaipanForCausalLM, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The continuation and the (row, step, vocabulary) logits it was chosen from."""
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    out: Any = face.generate(tokens, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, 1)


def same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(left[0], right[0])
    torch.testing.assert_close(left[1], right[1], rtol=1e-4, atol=1e-4)


def padded_pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A long and a short prompt; both as one left-padded batch; its mask."""
    long, short = random_tokens(1, 13), random_tokens(1, 5, seed=1)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, :8] = 0
    return long, short, torch.cat([long, torch.nn.functional.pad(short, (8, 0))]), mask


def stepwise(face: TaipanForCausalLM, tokens: Tensor, new: int) -> Tensor:
    """Greedy continuation from whole forwards, without any cache."""
    for _ in range(new):
        tokens = torch.cat([tokens, face(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("stack", STACKS)
def test_greedy_is_that_of_the_native_engine_and_of_whole_forwards(stack: str) -> None:
    native, face = pair(stack)
    tokens = random_tokens(2, 12)
    out = generated(face, tokens)
    assert torch.equal(out, native.generate(tokens, max_new_tokens=7))
    assert torch.equal(out, stepwise(face, tokens, 7))


def test_a_left_padded_row_continues_as_it_does_alone() -> None:
    _, face = pair()
    long, short, tokens, mask = padded_pair()
    sequences, logits = with_logits(face, tokens, attention_mask=mask)
    same((sequences[:1], logits[:1]), with_logits(face, long))
    same((sequences[1:], logits[1:]), with_logits(face, short))


def test_beams_find_what_an_exhaustive_search_finds() -> None:
    """With as many beams as there are pairs of tokens, a beam search of three steps is exhaustive."""
    vocabulary = 6
    _, face = pair(vocab_size=vocabulary)
    tokens = random_tokens(2, 9) % vocabulary
    found: Any = face.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=3,
        do_sample=False,
        num_beams=vocabulary**2,
        num_return_sequences=vocabulary**2,
        length_penalty=0.0,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    continued, scores = found.sequences, found.sequences_scores
    logits = face(continued).logits[:, 8:-1].log_softmax(-1)
    torch.testing.assert_close(scores, logits.gather(2, continued[:, 9:, None]).sum((1, 2)), rtol=0.0, atol=1e-4)
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * 3)
    for row in range(2):
        logits = face(torch.cat([tokens[row].expand(len(every), -1), every], 1)).logits[:, 8:-1].log_softmax(-1)
        best = logits.gather(2, every[..., None]).sum((1, 2)).argmax()
        assert torch.equal(continued[row * vocabulary**2, 9:], every[best])


def test_beams_on_a_padded_batch() -> None:
    _, face = pair()
    long, short, tokens, mask = padded_pair()
    out = generated(face, tokens, attention_mask=mask, num_beams=4)
    assert torch.equal(out, generated(face, tokens, attention_mask=mask, num_beams=4, use_cache=False))
    assert torch.equal(out[0, 13:], generated(face, long, num_beams=4)[0, 13:])
    assert torch.equal(out[1, 13:], generated(face, short, num_beams=4)[0, 5:])


def test_sampling_is_reproducible_and_varied() -> None:
    _, face = pair()
    tokens = random_tokens(1, 6)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generated(face, tokens, do_sample=True, temperature=3.0, top_p=0.95, num_return_sequences=3)

    assert sample(1).shape == (3, 13)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_prefill_in_pieces_changes_nothing() -> None:
    _, face = pair()
    _, _, tokens, mask = padded_pair()  # the first piece of the short row is padding only
    whole = with_logits(face, tokens, attention_mask=mask)
    same(with_logits(face, tokens, attention_mask=mask, prefill_chunk_size=8), whole)


def test_a_cached_prefix_is_continued_and_not_touched() -> None:
    _, face = pair()
    tokens = random_tokens(1, 16)
    prefix = face(tokens[:, :10]).past_key_values
    before = {name: tensor.clone() for name, tensor in prefix.state.tensors().items()}
    expected = with_logits(face, tokens)
    for _ in range(2):
        same(with_logits(face, tokens, past_key_values=copy.deepcopy(prefix)), expected)
    assert prefix.get_seq_length() == 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in prefix.state.tensors().items())


def test_without_a_cache_the_result_is_the_same() -> None:
    _, face = pair()
    tokens = random_tokens(2, 9)
    same(with_logits(face, tokens, use_cache=False), with_logits(face, tokens))


def test_the_cache_has_constant_size() -> None:
    _, face = pair()
    sizes = []
    for new in (9, 30):
        out = face.generate(
            random_tokens(1, 12), max_new_tokens=new, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
        cache = out.past_key_values
        assert isinstance(cache, TaipanCache)
        assert cache.state is not None
        sizes.append(cache.state.nbytes)
        assert cache.get_seq_length() == 12 + new - 1
    assert sizes[0] == sizes[1]


def test_the_end_of_text_stops_a_row() -> None:
    _, face = pair()
    tokens = random_tokens(2, 9)
    free = generated(face, tokens)
    eos = int(free[0, 11])
    stopped = generated(face, tokens, eos_token_id=eos)
    first = (free[0, 9:] == eos).nonzero()[0, 0]
    assert torch.equal(stopped[0, 9 : 10 + first], free[0, 9 : 10 + first])
    assert (stopped[0, 10 + first :] == 0).all()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    saved(directory, vocab_size=257, eos_token_id=256)
    Tokenizer.bytes().save(directory)
    return directory


def test_streaming_gives_the_text(text_model: Path) -> None:
    face, tokenizer = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = face.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, inputs.input_ids.shape[1] :])


def test_the_pipeline_works_on_a_native_directory(text_model: Path) -> None:
    run: Any = pipeline("text-generation", model=str(text_model))
    run.tokenizer.pad_token = run.tokenizer.eos_token
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompts = ["def f(x):", "import os\nimport sys\n"]
    together = run(prompts, batch_size=2, **options)
    assert together == [run(prompt, **options) for prompt in prompts]


def test_stop_strings_end_a_text_in_generate_and_in_the_pipeline(text_model: Path) -> None:
    face: Any = AutoModelForCausalLM.from_pretrained(text_model)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    free = face.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 9:].tolist()
    stop = next(chr(token) for token in free[2:] if 32 < token < 127)
    options = {"max_new_tokens": 9, "do_sample": False}
    stopped = face.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, **options)[0, 9:].tolist()
    assert stopped == free[: free.index(ord(stop)) + 1]
    assert torch.equal(face.generate(**inputs, tokenizer=tokenizer, **options), face.generate(**inputs, **options))
    run: Any = pipeline("text-generation", model=str(text_model))
    (answer,) = run("def f(x):", stop_sequence=stop, return_full_text=False, **options)
    assert answer["generated_text"] == tokenizer.decode(stopped)


def test_a_stop_string_may_begin_in_the_prompt_for_transformers_and_not_in_the_native_face(text_model: Path) -> None:
    """What docs/fine_tuning.md says: the same prompt and stop string, 1 token there and 12 here."""
    face: Any = AutoModelForCausalLM.from_pretrained(text_model)
    tokenizer, native = AutoTokenizer.from_pretrained(text_model), load(text_model)
    options = {"max_new_tokens": 12, "do_sample": False}
    for prompt in map(chr, range(97, 123)):
        inputs = tokenizer(prompt, return_tensors="pt")
        new = tokenizer.decode(face.generate(**inputs, **options)[0, 1:])
        stop = prompt + new[0]
        if new[0].isascii() and new[0].isprintable() and stop not in new:
            break
    stopped = face.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, **options)
    ours = native.generate(prompt, stream=True, stop_strings=[stop], **options)
    assert "".join(ours) == new
    assert (stopped.shape[1] - 1, ours.tokens_written, ours.finish_reason) == (1, 12, "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' does not work with Taipan"),
        ({"cache_implementation": "offloaded_static"}, "cache_implementation='offloaded_static' does not"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' does not"),
        ({"cache_implementation": "paged"}, "Continuous batching is not supported by Taipan"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' does not"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not supported by Taipan"),
        ({"dola_layers": "low"}, "dola generation is not supported by Taipan"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1}, "group beam search is not supported"),
        ({"num_beams": 2, "force_words_ids": [[3]]}, "constrained beam search is not supported"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not supported"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    _, face = pair()
    with warnings.catch_warnings(), pytest.raises(InputError, match=message):
        warnings.simplefilter("ignore")
        generated(face, random_tokens(1, 6), **options)


@pytest.mark.parametrize("stack", ["taipan", "samba"])
def test_assisted_decoding_gives_exactly_the_greedy_text(stack: str) -> None:
    """With a model that drafts as the large one does, with one that never does, and from the prompt itself."""
    apart: Any = {"tie_word_embeddings": False}  # a tied random model says the same token again and again
    _, face = pair(stack, **apart)
    tokens = random_tokens(1, 9).repeat(1, 3)
    expected = generated(face, tokens, max_new_tokens=24)
    assert len(set(expected[0, 27:].tolist())) > 8
    lengths: list[int] = []
    face.model.register_forward_pre_hook(lambda _, given, named: lengths.append(given[0].shape[1]), with_kwargs=True)
    for options in (
        {"assistant_model": pair(stack, **apart)[1]},
        {"assistant_model": pair(stack, seed=1, **apart)[1]},
        {"assistant_model": pair("mamba2", seed=2)[1]},
        {"prompt_lookup_num_tokens": 4},
    ):
        lengths.clear()
        assert torch.equal(generated(face, tokens, max_new_tokens=24, **options), expected), options
        assert max(lengths[1:]) > 1, "several tokens are checked in one call"
    # the same model as the draft: everything is accepted, so there are far fewer calls than tokens
    lengths.clear()
    generated(face, tokens, max_new_tokens=24, assistant_model=pair(stack, **apart)[1], num_assistant_tokens=6)
    assert len(lengths) <= 16, lengths


def test_a_cache_goes_back_to_any_place_it_recorded() -> None:
    _, face = pair()
    tokens = random_tokens(1, 20)
    for kept in range(6, 20):
        cache = TaipanCache()
        face(tokens[:, :6], past_key_values=cache)
        cache.activate_past_recording()
        for begin, end in ((6, 13), (13, 14), (14, 20)):
            face(tokens[:, begin:end], past_key_values=cache)
        cache.crop(kept - 20)
        assert cache.get_seq_length() == kept
        whole = TaipanCache()
        face(tokens[:, :kept], past_key_values=whole)
        one, other = (face(tokens[:, :1], past_key_values=state).logits for state in (cache, whole))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(StateError, match=r"cannot forget its last 3 tokens"):
        cache.crop(-3)  # what was recorded ends with a crop
        cache.crop(-3)


def test_continuous_batching_is_refused() -> None:
    _, face = pair()
    with pytest.raises(InputError, match="Continuous batching is not supported by Taipan"):
        face.generate_batch([[1, 2, 3]])


def test_embeddings_instead_of_tokens_are_refused() -> None:
    _, face = pair()
    with pytest.raises(InputError, match="inputs_embeds is not supported"):
        face.generate(inputs_embeds=torch.zeros(1, 3, 24), max_new_tokens=2)


def test_a_misspelt_option_is_refused() -> None:
    _, face = pair()
    with pytest.raises(ValueError, match="max_new_tokenz"):
        generated(face, random_tokens(1, 6), max_new_tokenz=3)


def test_ids_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    """A vocabulary padded above the tokenizer's: what is saved with it tells transformers."""
    native = small_model(dtype=torch.float32, vocab_size=300, eos_token_id=256)
    with torch.no_grad():
        native.model.embed_tokens.weight[257:] *= 20
    native.save_pretrained(tmp_path, Tokenizer.bytes())
    face: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([[65, 66]])
    assert int(face(tokens).logits[0, -1].argmax()) > 256
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        assert int(generated(face, tokens, max_new_tokens=12, **options).max()) < 257
    assert face.generation_config.eos_token_id == 256
