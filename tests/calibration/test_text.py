import itertools
import math
import random
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse24.calibration.documents import HELD_OUT, held_out_documents, split_text
from hf_sparse24.calibration.text import calibration_batches, share_out
from hf_sparse24.calibration.tokenizer import load_tokenizer
from hf_sparse24.calibration.windows import window_length

SPECIAL = ["[UNK]", "<s>", "</s>", "[CLS]", "[SEP]"]
WORDS = [f"w{number}" for number in range(96 - len(SPECIAL))]
UNK, BOS, EOS, CLS, SEP = range(5)


def make_tokenizer(adds_bos=False, **special):
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_max_length=8, **special)


@pytest.fixture
def tokenizer():
    return make_tokenizer(eos_token="</s>")


@pytest.fixture
def bert():
    return BertModel(tiny(BertConfig)).eval()


def tiny(config, **kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return config(**sizes, vocab_size=96, **kwargs)


def numbered(count, start=0):
    """Text that tells where it stands: word k is k modulo the vocabulary."""
    return " ".join(WORDS[index % len(WORDS)] for index in range(start, start + count))


def ids_of(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def flat(batches):
    return ids_of(batches).flatten().tolist()


class CountingTokenizer:
    """Counts the characters that a tokenizer reads."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **kwargs):
        self.read += len(text)
        return self.tokenizer(text, **kwargs)


# Windows


def test_documents_are_joined_by_the_end_of_text_token_and_cut_into_windows(tiny_llama, tokenizer):
    batches = calibration_batches(["w0 w1", "w0 w1", "w0 w1"], tiny_llama, tokenizer, 2, 4, batch_size=1)
    w0, w1 = len(SPECIAL), len(SPECIAL) + 1
    assert [batch["input_ids"].tolist() for batch in batches] == [[[w0, w1, EOS, w0]], [[w1, EOS, w0, w1]]]


def test_batches_hold_int64_windows_and_nothing_else(tiny_llama, tokenizer):
    batches = calibration_batches([numbered(500)], tiny_llama, tokenizer, 12, 16, batch_size=4)
    assert [set(batch) for batch in batches] == [{"input_ids"}] * 3
    assert all(batch["input_ids"].shape == (4, 16) and batch["input_ids"].dtype == torch.int64 for batch in batches)


def test_windows_are_dealt_out_evenly_and_none_is_lost(tiny_llama, tokenizer):
    batches = calibration_batches([numbered(500)], tiny_llama, tokenizer, 10, 16, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 3, 3]
    together = calibration_batches([numbered(500)], tiny_llama, tokenizer, 10, 16, batch_size=10)
    assert sorted(ids_of(batches).tolist()) == sorted(ids_of(together).tolist())


def test_a_document_longer_than_the_tokenizer_allows_is_not_truncated(tiny_llama, tokenizer):
    ids = flat(calibration_batches([numbered(40)], tiny_llama, tokenizer, 1, 40))
    assert ids == [len(SPECIAL) + index for index in range(40)]


def test_without_an_end_of_text_token_documents_touch(tiny_llama):
    ids = flat(calibration_batches(["w0 w1"] * 4, tiny_llama, make_tokenizer(), 2, 4))
    assert ids == [len(SPECIAL), len(SPECIAL) + 1] * 4


def test_every_window_of_an_encoder_stands_between_cls_and_sep(bert):
    tokenizer = make_tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    ids = ids_of(calibration_batches(["w1 w2 w3"] * 20, bert, tokenizer, 6, 8))
    assert ids.shape == (6, 8)
    assert (ids[:, 0] == CLS).all()
    assert (ids[:, -1] == SEP).all()
    assert (ids[:, 1:-1] != CLS).all()
    assert (ids[:, 1:-1] == SEP).any()


@pytest.mark.parametrize("adds_bos", [True, False])
def test_windows_begin_with_bos_if_the_tokenizer_begins_texts_with_it(tiny_llama, adds_bos):
    tokenizer = make_tokenizer(adds_bos, bos_token="<s>", eos_token="</s>")
    ids = ids_of(calibration_batches(["w1 w2 w3"] * 20, tiny_llama, tokenizer, 6, 8))
    assert (ids == BOS).sum(1).tolist() == [int(adds_bos)] * 6
    assert (ids[:, 0] == BOS).all() == adds_bos


def test_the_seed_decides_and_the_global_random_state_does_not(tiny_llama, tokenizer):
    documents = [numbered(30, start) for start in range(0, 3000, 7)]

    def make(seed):
        torch.rand(1), random.random()
        return flat(calibration_batches(documents, tiny_llama, tokenizer, 8, 16, seed=seed))

    assert make(0) == make(0)
    assert make(0) != make(1)


def test_only_as_much_text_is_tokenized_as_the_windows_need(tiny_llama, tokenizer):
    counting = CountingTokenizer(tokenizer)
    documents = [numbered(50)] * 20_000
    calibration_batches(documents, tiny_llama, counting, 8, 16)
    assert counting.read <= 4 * len(documents[0])  # 3 documents of 50 tokens hold 8 * 16


def test_one_long_document_does_not_fill_all_windows(tiny_llama, tokenizer):
    documents = ["w1 " * 100_000, *["w2 " * 30] * 20]
    ids = ids_of(calibration_batches(documents, tiny_llama, tokenizer, 16, 16))
    share = (ids == len(SPECIAL) + 1).float().mean()
    assert share < 0.5


def test_all_pieces_of_a_long_document_are_used_before_there_is_too_little(tiny_llama, tokenizer):
    ids = flat(calibration_batches(["w1 " * 2000], tiny_llama, tokenizer, 120, 16))
    assert ids.count(len(SPECIAL) + 1) > 0.9 * len(ids)


def test_blank_documents_are_passed_over(tiny_llama, tokenizer):
    ids = flat(calibration_batches(["", "w1 w2 w3", "  "] * 8, tiny_llama, tokenizer, 2, 8))
    assert ids == [len(SPECIAL) + 1, len(SPECIAL) + 2, len(SPECIAL) + 3, EOS] * 4


# Files


def test_splitting_a_text_keeps_all_of_it_and_cuts_between_words():
    text = numbered(1000)
    seen, held_out = split_text(text)
    assert seen + held_out == text
    assert seen.endswith(" ")
    assert HELD_OUT <= len(held_out) / len(text) < HELD_OUT + 0.06


def test_a_text_is_split_at_a_line_where_there_is_one_near():
    text = "a line of words\n" * 100
    seen, held_out = split_text(text)
    assert seen.endswith("\n")
    assert held_out.startswith("a line")


@given(st.text(max_size=200))
def test_any_text_can_be_split(text):
    seen, held_out = split_text(text)
    assert seen + held_out == text
    assert len(held_out) >= math.floor(len(text) * HELD_OUT)


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_the_held_out_tenth_of_a_file_is_never_seen(tiny_llama, tokenizer, tmp_path, kind):
    path = tmp_path / "book.txt"
    path.write_text("w1 " * 900 + "w2 " * 100)
    for seed in range(5):
        ids = flat(calibration_batches(kind(path), tiny_llama, tokenizer, 50, 16, seed=seed))
        assert len(SPECIAL) + 2 not in ids
        assert len(SPECIAL) + 1 in ids


def write_rows(datasets, path, column, values):
    rows = datasets.Dataset.from_dict({"number": list(range(len(values))), column: values})
    write = {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(path.suffix, rows.to_json)
    write(path)
    return path


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_the_held_out_tenth_of_a_files_rows_is_never_seen(tiny_llama, tokenizer, datasets, tmp_path, suffix, kind):
    path = write_rows(datasets, tmp_path / f"rows{suffix}", "content", [f"w{row} w{row}" for row in range(45)])
    seen = {
        token - len(SPECIAL)
        for seed in range(5)
        for token in flat(calibration_batches(kind(path), tiny_llama, tokenizer, 6, 16, seed=seed))
        if token != EOS
    }
    documents, tokenized = held_out_documents(path)
    held_out = [int(document.split()[0][1:]) for document in documents]
    assert not tokenized
    assert held_out == list(range(40, 45))
    assert seen == set(range(40))


def test_the_held_out_tenth_of_rows_of_token_ids(tiny_llama, datasets, tmp_path):
    path = write_rows(datasets, tmp_path / "rows.parquet", "input_ids", [[row, row] for row in range(20)])
    assert set(flat(calibration_batches(path, tiny_llama, None, 4, 9))) == set(range(18))
    documents, tokenized = held_out_documents(path)
    assert tokenized
    assert list(documents) == [[18, 18], [19, 19]]


def test_a_single_row_has_no_tenth_to_hold_out(tiny_llama, tokenizer, datasets, tmp_path):
    path = write_rows(datasets, tmp_path / "rows.jsonl", "text", [numbered(500)])
    with pytest.raises(ValueError, match=r"this file has a single row\. Give more rows, or a text file"):
        calibration_batches(path, tiny_llama, tokenizer, 2, 8)
    with pytest.raises(ValueError, match="single row"):
        held_out_documents(path)


def test_pieces_of_a_file_are_chosen_by_the_seed_from_all_of_the_calibration_part(tiny_llama, tokenizer, tmp_path):
    path = tmp_path / "book.md"
    path.write_text("".join(f"{word} " * 200 for word in WORDS))
    seen = [set(flat(calibration_batches(path, tiny_llama, tokenizer, 8, 16, seed=seed))) for seed in range(30)]
    assert len({frozenset(ids) for ids in seen}) > 1
    assert len(set().union(*seen)) > 0.6 * len(WORDS)


def test_no_word_is_cut_in_two(tiny_llama, tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(numbered(5000))
    assert UNK not in flat(calibration_batches(path, tiny_llama, tokenizer, 64, 16))


def test_a_missing_file_is_named(tiny_llama, tokenizer, tmp_path):
    for source in ("no_such_book.txt", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            calibration_batches(source, tiny_llama, tokenizer)


def test_a_file_that_is_no_text_is_refused(tiny_llama, tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(ValueError, match="must be UTF-8"):
        calibration_batches(path, tiny_llama, tokenizer)


# Datasets


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["text", "content"])
def test_a_dataset_is_read_from_its_column_of_text(tiny_llama, tokenizer, datasets, column, streaming):
    data = datasets.Dataset.from_dict({"number": list(range(30)), column: [f"w{n} w{n}" for n in range(30)]})
    data = data.to_iterable_dataset() if streaming else data
    first, again, other = (
        flat(calibration_batches(data, tiny_llama, tokenizer, 4, 12, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[2] == EOS
    assert UNK not in first


def test_rows_of_token_ids_are_taken_as_they_are_without_padding(tiny_llama, datasets):
    data = datasets.Dataset.from_dict({"input_ids": [[7, 8, 0]] * 8, "attention_mask": [[1, 1, 0]] * 8})
    assert flat(calibration_batches(data, tiny_llama, None, 2, 8)) == [7, 8] * 8


def test_a_dataset_without_a_clear_column_lists_its_columns(tiny_llama, tokenizer, datasets):
    data = datasets.Dataset.from_dict({"question": ["w1"], "answer": ["w2"]})
    with pytest.raises(ValueError, match="this one has question, answer"):
        calibration_batches(data, tiny_llama, tokenizer)


def test_a_dataset_without_rows_is_refused(tiny_llama, tokenizer, datasets):
    with pytest.raises(ValueError, match="has no rows"):
        calibration_batches(datasets.Dataset.from_dict({"text": []}), tiny_llama, tokenizer)


def test_a_dataset_dict_is_refused_with_advice(tiny_llama, tokenizer, datasets):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["w1"]}))
    with pytest.raises(ValueError, match=r"got a DatasetDict.*take one split"):
        calibration_batches(splits, tiny_llama, tokenizer)


def test_a_folder_and_a_file_of_records_are_loaded_by_datasets(tiny_llama, tokenizer, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "w1 w2 w3"}\n' * 20)
    expected = [len(SPECIAL) + 1, len(SPECIAL) + 2, len(SPECIAL) + 3, EOS] * 4
    for source in (path.parent, str(path.parent), path, str(path)):
        assert flat(calibration_batches(source, tiny_llama, tokenizer, 2, 8)) == expected


def test_a_name_is_split_into_dataset_and_configuration(tiny_llama, tokenizer, datasets, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return datasets.Dataset.from_dict({"text": [numbered(100)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/corpus", "owner/corpus:en"):
        calibration_batches(name, tiny_llama, tokenizer, 2, 8)
    assert asked == [(("owner/corpus", None), "train"), (("owner/corpus", "en"), "train")]


def test_without_the_package_datasets_a_name_says_what_to_install(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        calibration_batches("owner/corpus", tiny_llama, tokenizer)
    assert calibration_batches(["w1 w2"] * 9, tiny_llama, tokenizer, 1, 8)


# The model's own text


def test_the_model_writes_full_windows_though_its_config_would_stop_it(tiny_llama):
    tiny_llama.generation_config.eos_token_id = list(range(96))
    tiny_llama.generation_config.max_new_tokens = 3
    ids = ids_of(calibration_batches("self", tiny_llama, None, 6, 24, batch_size=2))
    assert ids.shape == (6, 24)
    assert ids.dtype == torch.int64


def test_its_windows_begin_with_bos_and_then_all_differ(tiny_llama):
    ids = ids_of(calibration_batches("self", tiny_llama, None, 90, 4))
    assert (ids[:, 0] == tiny_llama.config.bos_token_id).all()
    assert len(set(ids[:, 1].tolist())) == 90


@pytest.mark.parametrize(("bos", "eos", "first"), [(None, 5, 5), (None, [6, 7], 6), (4, 5, 4), (500, 5, 5)])
def test_the_first_token_is_bos_or_else_eos_if_the_model_knows_it(tiny_llama, bos, eos, first):
    tiny_llama.config.bos_token_id, tiny_llama.config.eos_token_id = bos, eos
    assert (ids_of(calibration_batches("self", tiny_llama, None, 4, 6))[:, 0] == first).all()


def test_a_model_without_either_begins_with_any_token(tiny_llama):
    tiny_llama.config.bos_token_id = tiny_llama.config.eos_token_id = None
    ids = ids_of(calibration_batches("self", tiny_llama, None, 120, 6))
    assert set(ids[:, 0].tolist()) == set(range(96))


def test_it_writes_what_it_finds_likely(tiny_llama):
    with torch.no_grad():
        tiny_llama.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(96, 32))
        tiny_llama.lm_head.bias = torch.nn.Parameter(torch.zeros(96).index_fill(0, torch.tensor([11, 12]), 30.0))
    tiny_llama.generation_config.repetition_penalty = 5.0
    ids = ids_of(calibration_batches("self", tiny_llama, None, 8, 40))[:, 2:]
    assert set(ids.flatten().tolist()) == {11, 12}
    # 304 tosses of a coin: five standard deviations of their mean are 0.14.
    assert (ids == 11).float().mean() == pytest.approx(0.5, abs=0.15)


def test_sampling_follows_the_seed_and_leaves_no_trace(tiny_llama):
    tiny_llama.train()
    tiny_llama.lm_head.eval()
    config, before = tiny_llama.generation_config, tiny_llama.generation_config.to_dict()
    state = torch.get_rng_state()
    first, again, other = (flat(calibration_batches("self", tiny_llama, None, 4, 12, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_llama.generation_config is config
    assert config.to_dict() == before
    assert tiny_llama.training
    assert not tiny_llama.lm_head.training


def test_a_failure_while_sampling_leaves_no_trace_either(tiny_llama, monkeypatch):
    config, state = tiny_llama.generation_config, torch.get_rng_state()

    def generate(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(tiny_llama, "generate", generate)
    with pytest.raises(MemoryError):
        calibration_batches("self", tiny_llama.train(), None, 4, 12)
    assert tiny_llama.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_llama.training


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_windows_can_be_written(tiny_llama, length):
    assert ids_of(calibration_batches("self", tiny_llama, None, 4, length)).shape == (4, length)


def test_models_that_cannot_write_text_are_refused(bert):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    for model in (bert, T5ForConditionalGeneration(T5Config(**sizes)), torch.nn.Linear(4, 4)):
        with pytest.raises(ValueError, match=f"generative decoder-only model; {type(model).__name__} is none"):
            calibration_batches("self", model, None, 4, 12)


# Mixtures

positive = st.floats(min_value=1e-9, max_value=1e9)


@given(st.lists(positive, min_size=1, max_size=12), st.integers(0, 300))
def test_shares_add_up_and_nobody_is_left_out(weights, extra):
    total = len(weights) + extra
    shares = share_out(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 1


@given(st.lists(positive, min_size=1, max_size=6), st.integers(6, 300))
def test_a_heavier_source_never_gets_less(weights, total):
    shares = share_out(total, weights)
    ordered = [share for _, share in sorted(zip(weights, shares, strict=True))]
    assert all(b >= a - 1 for a, b in itertools.pairwise(ordered))  # equal weights may differ by one


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 30))
def test_shares_are_exact_where_weights_divide_the_total(weights, factor):
    assert share_out(sum(weights) * factor, weights) == [weight * factor for weight in weights]


def test_largest_remainders_come_first():
    assert share_out(10, [0.55, 0.27, 0.18]) == [5, 3, 2]


def test_every_batch_of_a_mixture_has_all_kinds_by_weight(tiny_llama, tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("w3 " * 3000)
    source = [(["w1 " * 500], 2), (path, 1), (["w2 " * 500], 1.0)]
    batches = calibration_batches(source, tiny_llama, tokenizer, 32, 8, batch_size=8)
    first = [sorted(batch["input_ids"].mode(dim=1).values.sub(len(SPECIAL)).tolist()) for batch in batches]
    assert first == [[1, 1, 1, 1, 2, 2, 3, 3]] * 4


def test_a_mixture_may_hold_the_models_own_text(tiny_llama, tokenizer):
    batches = calibration_batches([("self", 1), (["w1 " * 500], 1)], tiny_llama, tokenizer, 8, 8, batch_size=2)
    for batch in batches:
        own, given_text = sorted(batch["input_ids"].tolist(), key=lambda row: row[0])
        assert own[0] == tiny_llama.config.bos_token_id
        assert set(given_text) <= {len(SPECIAL) + 1, EOS}


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "2", None, True])
def test_a_weight_that_is_no_positive_number_is_refused(tiny_llama, tokenizer, weight):
    with pytest.raises(ValueError, match="must be a positive number; got"):
        calibration_batches([(["w1"], weight)], tiny_llama, tokenizer)


def test_a_mixture_of_more_sources_than_windows_is_refused(tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="2 sources needs num_samples of at least as many; got 1"):
        calibration_batches([(["w1"], 1), (["w2"], 1)], tiny_llama, tokenizer, 1, 8)


def test_a_mixture_takes_text_only(tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="made of sources of text; got a list"):
        calibration_batches([([torch.zeros(1, 8).long()], 1), (["w1"], 1)], tiny_llama, tokenizer)


# Batches that the user made


def test_tensors_of_token_ids_become_batches(tiny_llama):
    items = [torch.full((2, 5), number, dtype=torch.int32) for number in range(3)]
    batches = calibration_batches(items, tiny_llama)
    assert [batch["input_ids"].tolist() for batch in batches] == [item.tolist() for item in items]
    assert batches[0]["input_ids"].dtype == torch.int64


def test_dicts_pass_unchanged(tiny_llama):
    item = {"input_ids": torch.ones(2, 3).long(), "labels": torch.full((2, 4), -100), "return_loss": True}
    for wrapped in (item, BatchEncoding(item)):
        (batch,) = calibration_batches([wrapped], tiny_llama)
        assert list(batch) == list(item)
        assert all(batch[key] is item[key] or torch.equal(batch[key], item[key]) for key in item)
        assert type(batch) is dict


def test_a_generator_is_read_only_as_far_as_needed(tiny_llama):
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield {"pixel_values": torch.ones(4, 3, 2, 2)}

    assert len(calibration_batches(stream(), tiny_llama, num_samples=10)) == 3
    assert read == [0, 1, 2]


def test_fewer_sequences_than_asked_for_are_taken_as_they_are(tiny_llama):
    assert len(calibration_batches([torch.zeros(2, 3).long()] * 2, tiny_llama, num_samples=128)) == 2


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "Calibration data is empty"),
        (iter(()), "Calibration data is empty"),
        (None, "got None"),
        (7, "got 7"),
        (torch.zeros(2, 3).long(), "got a Tensor. Put a single batch into a list"),
        ({"input_ids": torch.zeros(2, 3).long()}, "got a dict. Put a single batch into a list"),
        (["text", torch.zeros(2, 3).long()], "item 0 is 'text'"),
        ([torch.zeros(3).long()], r"batch 0 is torch.int64 of shape \(3,\)"),
        ([torch.zeros(2, 3)], "batch 0 is torch.float32"),
        ([{}], "batch 0 holds no sequence"),
        ([torch.zeros(0, 3).long()], "batch 0 holds no sequence"),
        ([{"x": torch.ones(1, 2)}, {"x": torch.tensor([[1.0, math.nan]])}], "batch 1 has NaN or Inf in 'x'"),
        ([{"x": torch.tensor([[1.0, -math.inf]])}], "batch 0 has NaN or Inf in 'x'"),
        ([torch.tensor([[3, 96]])], "a token id is 96, and LlamaForCausalLM has 96 token embeddings"),
        ([{"input_ids": torch.tensor([[3, -1]])}], "a token id is -1"),
    ],
)
def test_bad_batches_are_refused_in_one_sentence(tiny_llama, items, message):
    with pytest.raises(ValueError, match=message):
        calibration_batches(items, tiny_llama)


# Text that does not fit


def test_too_little_text_says_how_much_there_is(tiny_llama, tokenizer):
    with pytest.raises(
        ValueError, match="128 windows of 16 tokens need 2048 tokens; the dataset gave 31, enough for 1 "
    ):
        calibration_batches([numbered(30)], tiny_llama, tokenizer, 128, 16)
    with pytest.raises(ValueError, match="the dataset gave 0, enough for 0 windows"):
        calibration_batches(["", " "], tiny_llama, tokenizer, 128, 16)


def test_windows_longer_than_the_context_are_refused(bert, tokenizer):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=20, n_embd=16, n_layer=1, n_head=2, vocab_size=96))
    for model, context in ((bert, 512), (gpt2, 20)):
        with pytest.raises(ValueError, match=f"context of {context}"):
            calibration_batches([numbered(9)], model, tokenizer, 1, context + 1)
        assert calibration_batches([numbered(600)], model, tokenizer, 1, context)


def test_windows_have_1024_tokens_or_as_many_as_the_model_reads(bert, tiny_llama, tokenizer):
    for model, length in ((bert, 512), (tiny_llama, 1024)):
        (batch,) = calibration_batches([numbered(2100)], model, tokenizer, 2)
        assert batch["input_ids"].shape == (2, length)
    del tiny_llama.config.max_position_embeddings
    assert window_length(tiny_llama, None) == 1024
    assert window_length(bert, 2000) == 2000  # what was asked for is refused, not shortened


def test_a_file_is_looked_for_before_the_context(bert, tokenizer):
    for source in ("missing.txt", [("self", 1), ("missing.txt", 1)]):
        with pytest.raises(FileNotFoundError, match=r"asked from 'missing.txt'"):
            calibration_batches(source, bert, tokenizer, 1, 4000)


def test_positions_that_roberta_reserves_are_no_context(tokenizer):
    roberta = RobertaModel(tiny(RobertaConfig, max_position_embeddings=34, pad_token_id=1)).eval()
    with pytest.raises(ValueError, match="context of 32"):
        calibration_batches([numbered(99)], roberta, tokenizer, 1, 33)
    (batch,) = calibration_batches([numbered(99)], roberta, tokenizer, 1, 32)
    roberta(**batch)


def test_an_encoder_decoder_wants_batches_instead_of_text(tokenizer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    with pytest.raises(ValueError, match="give batches with input_ids and labels"):
        calibration_batches([numbered(99)], T5ForConditionalGeneration(T5Config(**sizes)), tokenizer, 1, 8)


def test_special_tokens_need_room(bert):
    with pytest.raises(ValueError, match="sequence_length=2 leaves no room"):
        calibration_batches(["w1"], bert, make_tokenizer(cls_token="[CLS]", sep_token="[SEP]"), 1, 2)


def test_a_tokenizer_of_another_model_is_refused(tiny_llama, tokenizer):
    tokenizer.add_tokens(["w999"])
    with pytest.raises(ValueError, match=r"does not match the model: a token id is 96, .* has 96 token embeddings"):
        calibration_batches(["w1 w999"] * 9, tiny_llama, tokenizer, 1, 8)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_whatever_the_text(tiny_llama, tokenizer):
    tiny_llama.resize_token_embeddings(50)
    message = r"does not match the model: it has 96 tokens, and LlamaForCausalLM has 50 token embeddings"
    with pytest.raises(ValueError, match=message):
        calibration_batches(["w1 w2 w3"] * 20, tiny_llama, tokenizer, 2, 8)


def test_an_added_token_that_no_text_has_is_no_reason_to_refuse_a_tokenizer(tiny_llama, caplog):
    tokenizer = make_tokenizer(eos_token="</s>", pad_token="[PAD]")
    assert len(tokenizer) == 97
    assert len(calibration_batches(["w1 w2 w3"] * 20, tiny_llama, tokenizer, 2, 8)[0]["input_ids"]) == 2
    assert not caplog.messages


@pytest.mark.parametrize(("ends", "warns"), [(2, False), (7, True), ([7, 2], False), ([7, 8], True), (None, False)])
def test_special_tokens_that_are_not_the_models_are_warned_of(tiny_llama, tokenizer, caplog, ends, warns):
    tiny_llama.config.eos_token_id = ends
    tiny_llama.generation_config.eos_token_id = None
    calibration_batches(["w1 w2 w3"] * 20, tiny_llama, tokenizer, 2, 8)
    expected = "its eos_token_id is 2, the config of LlamaForCausalLM has " + ("7 or 8." if ends == [7, 8] else "7.")
    assert [expected in message for message in caplog.messages] == [True] * warns


@pytest.mark.parametrize("key", ["decoder_input_ids", "labels"])
def test_what_a_decoder_reads_has_embeddings_in_every_batch(key):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=96))

    def batch(highest):
        return {"input_ids": torch.full((2, 5), 95), key: torch.tensor([[3, highest], [5, 3]])}

    with pytest.raises(ValueError, match="a token id is -100"):
        calibration_batches(
            [{"input_ids": torch.ones(2, 5).long(), "decoder_input_ids": torch.full((2, 2), -100)}], t5
        )
    with pytest.raises(ValueError, match=r"a token id is 96, and T5Stack has 96 token embeddings"):
        calibration_batches([batch(95), batch(96)], t5)
    labelled = batch(95) | {"labels": torch.tensor([[3, 95], [-100, 3]])}
    assert len(calibration_batches([labelled], t5)) == 1


def test_labels_of_other_models_are_no_token_ids(bert):
    batch = {"input_ids": torch.ones(2, 5).long(), "labels": torch.full((2, 5), 1000)}
    assert len(calibration_batches([batch], bert)) == 1


def test_a_tokenizer_is_found_by_its_name_or_by_the_models(tiny_llama, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "words")
    expected = flat(calibration_batches([numbered(50)], tiny_llama, tokenizer, 1, 16))
    for name in (tmp_path / "words", str(tmp_path / "words")):
        assert flat(calibration_batches([numbered(50)], tiny_llama, name, 1, 16)) == expected
    tiny_llama.name_or_path = str(tmp_path / "words")
    assert flat(calibration_batches([numbered(50)], tiny_llama, None, 1, 16)) == expected


def test_a_missing_tokenizer_is_asked_for(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="the model has no name to find it by; pass tokenizer"):
        calibration_batches([numbered(50)], tiny_llama, None, 1, 16)
    tiny_llama.save_pretrained(tmp_path / "bare")
    tiny_llama.name_or_path = str(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has none that transformers reads; .*, or pass another as tokenizer"):
        calibration_batches([numbered(50)], tiny_llama, None, 1, 16)


@pytest.mark.parametrize(("config", "known"), [(BertConfig, 5), (RobertaConfig, 5), (GPT2Config, 1), (T5Config, 104)])
def test_a_tokenizer_that_transformers_makes_without_files_is_refused(tiny_llama, tmp_path, config, known):
    config().save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) == known  # what this is about: transformers does not refuse
    with pytest.raises(
        ValueError, match=rf"lacks its files: what .* of {known} special tokens, reads no text; save it"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"or pass another as tokenizer \(--tokenizer\)"):
        calibration_batches([numbered(50)], tiny_llama, str(tmp_path), 1, 16)
    with pytest.raises(ValueError, match="has no tokens but special ones"):
        calibration_batches([numbered(50)], tiny_llama, made, 1, 16)


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == [100, 101, 1]


@pytest.mark.parametrize("key", ["num_samples", "sequence_length", "batch_size"])
@pytest.mark.parametrize("value", [0, 1.5, "8"])
def test_counts_are_positive_integers(tiny_llama, key, value):
    with pytest.raises(ValueError, match=f"{key} must be an integer of at least 1; got {value!r}"):
        calibration_batches(["w1"], tiny_llama, **{key: value})
