"""Pairs and images on files: read by the model's own processors, and measured by what fits the kind of model."""

import json
import wave

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_sparse24 import prune_
from hf_sparse24.evaluation import evaluate_pairs, feature_cosine, image_batches, images_in, nll, retrieval_recall
from tests import families
from tests.test_cli import cli  # noqa: F401

SPECIAL = ["[PAD]", "<s>", "</s>", "<en>"]


@pytest.fixture(autouse=True)
def own_cache(datasets):
    """Tables are read by datasets, which keeps them."""


def save_tokenizer(folder, prompt=""):
    """A tokenizer of 92 words that writes a prompt before each text and </s> behind it."""
    words = SPECIAL + [f"w{number}" for number in range(92)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [(token, words.index(token)) for token in {*prompt.split(), "</s>"}]
    core.post_processor = processors.TemplateProcessing(single=f"{prompt} $A </s>".strip(), special_tokens=ids)
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<en>"]}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def save(folder, family, prompt=""):
    model = families.build(family)
    if family == "t5":
        model.config.decoder_start_token_id = 0
    model.save_pretrained(folder)
    save_tokenizer(folder, prompt)
    return model


def word(number):
    return len(SPECIAL) + number


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_pairs(tmp_path, count=12):
    rows = [
        {"input": " ".join(f"w{(5 * row + k) % 90}" for k in range(3 + row % 4)), "target": f"w{7 * row % 90} w{row}"}
        for row in range(count)
    ]
    return write(tmp_path / "pairs.jsonl", rows), rows


def ids(text):
    return [word(int(part[1:])) for part in text.split()]


def test_an_encoder_has_to_find_the_target_of_each_input(tmp_path):
    bert = save(tmp_path / "bert", "bert_mlm")
    path, rows = text_pairs(tmp_path)
    found = evaluate_pairs(bert, str(tmp_path / "bert"), path)
    queries, documents = ([[*ids(row[key]), 2] for row in rows] for key in ("input", "target"))
    assert (found.metric, found.samples, found.unit, found.dataset) == ("recall_at_1", 12, "pairs", "pairs.jsonl")
    assert found.value == retrieval_recall(bert, queries, documents).recall_at_1
    # An encoder finds what is equal.
    same = write(tmp_path / "same.jsonl", [{"input": row["input"], "target": row["input"]} for row in rows])
    assert evaluate_pairs(bert, str(tmp_path / "bert"), same).value == 1.0


def test_targets_that_tie_are_told(tmp_path, caplog):
    bert = save(tmp_path / "bert", "bert_mlm")
    path = write(tmp_path / "pairs.jsonl", [{"input": "w1", "target": "w2"}] * 3)
    assert evaluate_pairs(bert, str(tmp_path / "bert"), path).value == 1.0
    assert "3 of 3 inputs find another target as near as their own" in caplog.text


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_an_encoder_decoder_model_has_to_write_the_target(tmp_path, family, batch_size):
    model = save(tmp_path / "model", family)
    path, rows = text_pairs(tmp_path)
    batches = [
        {"input_ids": torch.tensor([[*ids(row["input"]), 2]]), "labels": torch.tensor([[*ids(row["target"]), 2]])}
        for row in rows
    ]
    found = evaluate_pairs(model, str(tmp_path / "model"), path, batch_size=batch_size)
    assert (found.metric, found.samples, found.unit) == ("nll", 12, "pairs")
    assert found.value == pytest.approx(nll(model, batches), rel=1e-5)


def test_special_tokens_before_a_target_are_given_and_not_scored(tmp_path):
    bart = save(tmp_path / "bart", "bart", prompt="<s> <en>")  # its decoder starts with <s> anyway
    path, rows = text_pairs(tmp_path, 4)
    batches = [
        {
            "input_ids": torch.tensor([[1, 3, *ids(row["input"]), 2]]),
            "decoder_input_ids": torch.tensor([[1, 3, *ids(row["target"])]]),
            "labels": torch.tensor([[-100, *ids(row["target"]), 2]]),
        }
        for row in rows
    ]
    # Its decoder reads <en>, though that is not scored.
    assert evaluate_pairs(bart, str(tmp_path / "bart"), path).value == pytest.approx(nll(bart, batches), rel=1e-5)


@pytest.fixture
def read_waves(monkeypatch):
    """What transformers reads sounds with is not a dependency; this reads 16-bit WAV at 16 kHz."""

    def load(path, sampling_rate):
        with wave.open(path) as file:
            assert file.getframerate() == sampling_rate
            return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768

    monkeypatch.setattr("hf_sparse24.evaluation.files.load_audio", load)


def sound_pairs(tmp_path, seconds=0.5):
    for number in range(2):
        with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            noise = np.random.default_rng(number).normal(size=int(16000 * seconds)) * 3000
            file.writeframes(noise.astype(np.int16).tobytes())
    rows = [{"audio": f"{number}.wav", "target": f"w{number} w{number + 5}"} for number in range(2)]
    return write(tmp_path / "clips.jsonl", rows)


def save_whisper(folder):
    """A tiny Whisper that reads one second."""
    model = WhisperForConditionalGeneration(WhisperConfig(**families.SEQ2SEQ, max_source_positions=50)).eval()
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_a_speech_model_has_to_write_what_is_said(tmp_path, read_waves):
    model = save_whisper(tmp_path / "whisper")
    found = evaluate_pairs(model, str(tmp_path / "whisper"), sound_pairs(tmp_path))
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    batches = []
    for number in range(2):
        with wave.open(str(tmp_path / f"{number}.wav")) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        labels = torch.tensor([[word(number), word(number + 5), 2]])
        batches.append({**extract(sound, sampling_rate=16000, return_tensors="pt"), "labels": labels})
    assert (found.metric, found.samples, found.dataset) == ("nll", 2, "clips.jsonl")
    assert found.value == pytest.approx(nll(model, batches), rel=1e-5)
    with pytest.raises(ValueError, match=r"0\.wav takes 1\.5 s; the model reads 1 s"):
        evaluate_pairs(model, str(tmp_path / "whisper"), sound_pairs(tmp_path, 1.5))
    (tmp_path / "1.wav").unlink()
    sounds = write(tmp_path / "gone.jsonl", [{"audio": "1.wav", "target": "w1"}])
    with pytest.raises(FileNotFoundError, match=r"names the sound .*1\.wav'; there is no such file"):
        evaluate_pairs(model, str(tmp_path / "whisper"), sounds)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "w1", "target": "w2"}], "needs? a column 'target' and one of .*has query, target"),
        ([{"input": "w1", "audio": "a.wav", "target": "w2"}], "one of 'input' and 'audio'"),
        ([{"input": "w1", "target": "w2"}, {"input": None, "target": "w2"}], "Row 2 of pairs.jsonl has no text"),
        ([{"audio": "a.wav", "target": "w2"}], "BertForMaskedLM reads text"),
        ([{"input": "w1 " * 99, "target": "w2"}], r"reads 32 tokens, and row 1 has 100.*--max-length"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(tmp_path, rows, message):
    bert = save(tmp_path / "bert", "bert_mlm")
    bert.config.max_position_embeddings = 32
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(bert, str(tmp_path / "bert"), write(tmp_path / "pairs.jsonl", rows))


def test_only_the_beginning_of_long_texts_is_read_where_that_was_asked_for(tmp_path):
    bert = save(tmp_path / "bert", "bert_mlm")
    path = write(tmp_path / "pairs.jsonl", [{"input": f"w{row} " * 99, "target": f"w{row} " * 7} for row in range(5)])
    cut = write(tmp_path / "cut.jsonl", [{"input": f"w{row} " * 7, "target": f"w{row} " * 7} for row in range(5)])
    found = [evaluate_pairs(bert, str(tmp_path / "bert"), table, max_length=8).value for table in (path, cut)]
    assert found == [1.0, 1.0]


def test_an_encoder_without_tokenizer_files_is_refused(cli, tmp_path):  # noqa: F811
    families.build("bert_mlm").save_pretrained(tmp_path / "bert")
    table, _ = text_pairs(tmp_path)
    code, _, err = cli("evaluate", tmp_path / "bert", "--pairs", table)
    assert code == 1
    assert "bert lacks its files: what transformers makes without them, a BertTokenizer of 5 special" in err


def test_a_model_that_writes_text_is_refused(tmp_path, tiny_llama):
    path, _ = text_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM writes text\. Measure its perplexity"):
        evaluate_pairs(tiny_llama, str(tmp_path), path)


def test_a_model_that_does_not_say_how_its_decoder_begins_is_refused(tmp_path):
    t5 = save(tmp_path / "t5", "t5")
    t5.config.decoder_start_token_id = t5.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="set its decoder_start_token_id"):
        evaluate_pairs(t5, str(tmp_path / "t5"), text_pairs(tmp_path)[0])


def test_a_missing_table_and_one_of_another_kind_are_named(tmp_path):
    bert = families.build("bert_mlm")
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl'; there is no such file"):
        evaluate_pairs(bert, str(tmp_path), tmp_path / "no.jsonl")
    (tmp_path / "pairs.txt").write_text("w1")
    with pytest.raises(ValueError, match=r"rows of \.json, .*; got pairs\.txt"):
        evaluate_pairs(bert, str(tmp_path), tmp_path / "pairs.txt")


# Images


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, shape in (("b.png", (40, 50, 3)), ("a.PNG", (20, 20)), ("more/c.png", (64, 32, 4))):
        image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def dinov2(tmp_path, magnitude):
    """A dense model, and a pruned one in a folder beside it."""
    pytest.importorskip("PIL")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    dense, pruned = families.build("dinov2"), families.build("dinov2")
    prune_(pruned, magnitude())
    for model, name in ((dense, "dense"), (pruned, "pruned")):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return dense, pruned


def test_images_are_read_by_the_models_own_processor_in_any_mode_and_size(tmp_path, photos, dinov2):
    images = images_in(photos)
    assert [path.name for path in images] == ["a.PNG", "b.png", "c.png"]
    batches = list(image_batches(str(tmp_path / "dense"), images, batch_size=2))
    assert [list(batch) for batch in batches] == [["pixel_values"]] * 2
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    gray = batches[0]["pixel_values"][0]
    assert torch.equal(gray[0], gray[1])
    with pytest.raises(ValueError, match="There are no images in"):
        images_in(tmp_path / "dense")


# The command


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_evaluate_measures_images_against_the_dense_model(cli, tmp_path, photos, dinov2, pooling):  # noqa: F811
    arguments = ("--images", photos, "--dense", tmp_path / "dense", "--pooling", pooling, "--json")
    code, out, err = cli("evaluate", tmp_path / "pruned", *arguments)
    assert code == 0, err
    found = json.loads(out)
    batches = list(image_batches(str(tmp_path / "dense"), images_in(photos)))
    dense, pruned = dinov2
    assert found["value"] == pytest.approx(feature_cosine(pruned, dense, batches, pooling), rel=1e-5)
    assert found["value"] < 0.9999
    assert (found["samples"], found["unit"], found["dataset"]) == (3, f"images, {pooling} feature", "photos")
    assert found["recovery"] == pytest.approx(100 * found["value"])


def test_evaluate_measures_pairs_and_the_card_has_them(cli, tmp_path, magnitude):  # noqa: F811
    t5 = save(tmp_path / "dense", "t5")
    path, _ = text_pairs(tmp_path)
    assert cli("prune", tmp_path / "dense", tmp_path / "packed", "--method", "magnitude")[0] == 0
    arguments = ("--pairs", path, "--dense", tmp_path / "dense", "--json")
    code, out, err = cli("evaluate", tmp_path / "packed", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["dense"] == pytest.approx(evaluate_pairs(t5, str(tmp_path / "dense"), path).value, rel=1e-5)
    assert found["dense"] != found["value"]
    assert found["recovery"] == pytest.approx(100 * found["dense"] / found["value"])
    (tmp_path / "quality.json").write_text(out)
    code, _, err = cli("card", tmp_path / "packed", "user/t5", "--evaluation", tmp_path / "quality.json")
    assert code == 0, err
    card = (tmp_path / "packed" / "README.md").read_text()
    row = f"| Nll (lower is better) | pairs.jsonl, 12 pairs | {found['dense']:.4g} | {found['value']:.4g} |"
    assert row in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--pairs FILE, or --images FOLDER"),
        (("--text", "a.txt", "--pairs", "b.jsonl"), "one thing to measure at a time"),
        (("--images", "photos"), "name that with --dense"),
        (("--pairs", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_evaluate_asks_for_one_thing(cli, tiny_llama_folder, arguments, message):  # noqa: F811
    code, _, err = cli("evaluate", tiny_llama_folder, *arguments)
    assert code == 1
    assert message in next(line for line in err.splitlines() if line.startswith("hf-sparse24: "))
