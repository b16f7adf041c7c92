"""Tokenisation against transformers' T5 tokenizer on a SentencePiece model trained here."""

import random

import numpy as np
import pytest

from sparvar_jax.models.text_tokens import load_tokenizer, padded_length

PROMPTS = [
    "a red apple",
    "  two   blue\ttriangles \n left of a green circle ",
    "An owl, wearing spectacles; 35 mm photograph (f/1.8)!",
    "un café très chaud ﬁne ½ ① Å",
    "苹果 and ünknown ☃ letters",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("tokenizer")
    text = "a the red blue green apple triangle circle owl left of on wearing photograph café"
    words = text.split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(400)]
    (path / "corpus.txt").write_text("\n".join(lines + PROMPTS[:3]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "spiece"),
        vocab_size=120,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.T5Tokenizer.from_pretrained(str(folder), extra_ids=10)


@pytest.fixture(scope="module")
def json_folder(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("json")
    reference.save_pretrained(str(path))
    return path


@pytest.mark.parametrize("source", ["folder", "json_folder"])
def test_ids_equal_those_of_transformers(source, reference, request):
    tokenizer = load_tokenizer(request.getfixturevalue(source))
    ids, lengths = tokenizer.encode(PROMPTS)
    for row, length, prompt in zip(ids, lengths, PROMPTS, strict=True):
        assert row[:length].tolist() == reference(prompt).input_ids, prompt
        assert not row[length:].any()
    assert ids.dtype == lengths.dtype == np.int32


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end(folder, reference):
    prompt = "a red apple " * 300
    with pytest.warns(UserWarning, match="cut to 512"):
        ids, lengths = load_tokenizer(folder).encode([prompt])
    expected = reference(prompt, max_length=512, truncation=True).input_ids
    assert lengths.tolist() == [512]
    assert ids.tolist() == [expected]
    assert expected[-1] == 1


@pytest.mark.parametrize("prompts", [[], [""], ["an apple", " \n"], "an apple"])
def test_prompts_without_words_are_refused(prompts, folder):
    with pytest.raises(ValueError, match="prompt"):
        load_tokenizer(folder).encode(prompts)


def test_padded_lengths_are_few():
    assert [padded_length(n) for n in (1, 32, 33, 65, 129, 512)] == [32, 32, 64, 128, 512, 512]
    assert padded_length(70, max_length=77) == 77
    assert padded_length(3, max_length=20) == 20


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected spiece\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_other_control_tokens_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2}, unk_token="<s>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="<pad> = 0 and </s> = 1"):
        load_tokenizer(tmp_path)
