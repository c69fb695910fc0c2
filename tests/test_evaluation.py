import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from hf_sparse24 import Sparse24Config, prune_
from hf_sparse24.calibration.documents import split_text
from hf_sparse24.evaluation import (
    Evaluation,
    compared,
    embed,
    feature_cosine,
    features,
    held_out_tokens,
    nll,
    perplexity,
    print_evaluations,
    read_evaluations,
    recovery,
    retrieval_recall,
)
from tests import families


class UniformModel(torch.nn.Module):
    """Predicts every token of a vocabulary of 7 with the same probability."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(7))

    def forward(self, ids):
        return SimpleNamespace(logits=self.weight.expand(*ids.shape, 7))


class LookUp(torch.nn.Module):
    """An encoder whose hidden state for token i is row i of a table, so that embeddings are known by hand."""

    def __init__(self, rows):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(rows, dtype=torch.float32))

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


# Directions in the plane: tokens 0 to 3 point east, north-east, north and west.
COMPASS = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]


def break_at(model, call):
    """Make every output of a model NaN from its n-th call on."""
    calls = []

    def hook(module, arguments, output):
        calls.append(module)
        if len(calls) >= call:
            output[0].fill_(math.nan)

    model.register_forward_hook(hook)
    return model


# Perplexity


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    assert perplexity(UniformModel(), torch.randint(0, 7, (70,)), window=10) == pytest.approx(7)


def test_it_is_the_exponential_of_the_mean_loss(tiny_llama):
    ids = torch.randint(0, 96, (40,))
    losses = [tiny_llama(window[None], labels=window[None]).loss.item() for window in ids.view(4, 10)]
    assert perplexity(tiny_llama, ids, window=10, batch_size=3) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_a_rest_shorter_than_a_window_is_dropped(tiny_llama):
    ids = torch.randint(0, 96, (25,))
    assert perplexity(tiny_llama, ids, window=10) == perplexity(tiny_llama, ids[:20], window=10)


def test_too_little_text_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="one window of text; got 5"):
        perplexity(tiny_llama, torch.zeros(5, dtype=torch.int64), window=10)


def test_a_window_longer_than_the_context_is_refused(tiny_llama):
    with pytest.raises(
        ValueError, match="Sequences of 2049 tokens were asked for; LlamaForCausalLM has a context of 2048"
    ):
        perplexity(tiny_llama, torch.zeros(3000, dtype=torch.int64), window=2049)


def test_the_ids_of_another_tokenizer_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="a token id is 96, and LlamaForCausalLM has 96 token embeddings"):
        perplexity(tiny_llama, torch.full((20,), 96), window=10)


def test_nan_logits_are_refused_with_the_number_of_their_batch(tiny_llama):
    break_at(tiny_llama.lm_head, call=2)
    with pytest.raises(ValueError, match="logits of batch 2 are NaN"):
        perplexity(tiny_llama, torch.randint(0, 96, (40,)), window=10, batch_size=1)


def test_a_perplexity_beyond_float64_is_infinite_and_its_recovery_zero():
    class Wrong(UniformModel):
        def forward(self, ids):
            return SimpleNamespace(logits=F.one_hot(ids, 7) * -1e4)

    ids = torch.zeros(20, dtype=torch.int64)
    assert perplexity(Wrong(), ids, window=10) == math.inf
    assert recovery("perplexity", dense=10, pruned=math.inf) == 0


@pytest.mark.parametrize("family", ["bert_mlm", "bert", "bart", "dinov2"])
def test_a_model_without_a_causal_head_is_told_what_measures_it(family):
    with pytest.raises(ValueError, match=r"needs a causal language model and \w+ is not one") as error:
        perplexity(families.build(family), torch.zeros(20, dtype=torch.int64), window=10)
    assert all(name in str(error.value) for name in ("nll", "retrieval_recall", "feature_cosine"))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_measuring_and_modes_are_restored(training):
    model = families.build("gpt2", resid_pdrop=0.5)
    ids = torch.randint(0, 96, (40,))
    expected = perplexity(model, ids, window=10)
    model.train(training)
    model.lm_head.eval()
    assert perplexity(model, ids, window=10) == expected
    assert model.transformer.h[0].training is training
    assert model.lm_head.training is False


class Letters:
    """A tokenizer of letters, with 1 at the beginning of a text if asked to."""

    def __init__(self, bos_token_id=None, eos_token_id=None):
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        return {"input_ids": start + [ord(letter) for letter in text]}


TEXT = "calibration " * 90 + "held out.\n" * 24


def test_the_held_out_text_is_the_end_that_calibration_does_not_read():
    token_ids = held_out_tokens(Letters(), TEXT, window=10, windows=3)
    held_out = split_text(TEXT)[1]
    assert "".join(map(chr, token_ids.tolist())) == held_out[:30]
    assert "calibration" not in held_out


def test_each_window_begins_as_the_tokenizer_begins_a_text():
    token_ids = held_out_tokens(Letters(bos_token_id=1), TEXT, window=10, windows=3).view(3, 10)
    assert token_ids[:, 0].tolist() == [1, 1, 1]
    assert "".join(map(chr, token_ids[:, 1:].flatten().tolist())) == split_text(TEXT)[1][:27]


def test_of_a_file_of_rows_the_last_tenth_is_scored(datasets, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ["calibration"] * 90 + ["", "held", "out"] + ["more"] * 7
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    token_ids = held_out_tokens(Letters(bos_token_id=1, eos_token_id=2), path, window=6, windows=2)
    assert "".join(map(chr, token_ids.tolist())) == "\1held\2\1out\2m"
    with pytest.raises(ValueError, match="which is held out, has 35 tokens: less than one window of 99"):
        held_out_tokens(Letters(), path, window=99, windows=2)


def test_a_file_of_text_is_read_as_its_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    expected = held_out_tokens(Letters(), TEXT, window=10, windows=3)
    assert torch.equal(held_out_tokens(Letters(), path, window=10, windows=3), expected)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        held_out_tokens(Letters(), tmp_path / "missing.jsonl", window=10, windows=3)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"less than one window of 1000\. Give a longer text"):
        held_out_tokens(Letters(), TEXT, window=1000, windows=3)


# Loss of encoder-decoder models


def seq2seq_batch(family):
    batch = families.inputs(family)
    del batch["decoder_input_ids"]
    labels = torch.randint(3, 96, (2, 5))
    labels[0, 2:] = -100
    return batch | {"labels": labels}


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_nll_is_the_loss_of_the_model_itself(family):
    model, batch = families.build(family, decoder_start_token_id=1), seq2seq_batch(family)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    # Both sum 7 float32 losses of about 4.6, in another order.
    assert nll(model, [batch]) == pytest.approx(expected, rel=1e-6)


def test_nll_counts_tokens_and_not_batches():
    model = families.build("bart")
    batch = seq2seq_batch("bart")
    one_by_one = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
    assert nll(model, one_by_one) == pytest.approx(nll(model, [batch]), rel=1e-6)


def test_nll_takes_decoder_input_ids():
    model, batch = families.build("bart"), seq2seq_batch("bart")
    given = batch | {"decoder_input_ids": torch.full((2, 5), 7)}
    with torch.no_grad():
        assert nll(model, [given]) == pytest.approx(model(**given).loss.item(), rel=1e-6)
    assert nll(model, [given]) != pytest.approx(nll(model, [batch]), rel=1e-3)


def test_nll_of_a_half_precision_model_moves_its_float_inputs():
    model = families.build("whisper")
    expected = nll(model, [seq2seq_batch("whisper")])
    # bfloat16 has 8 bits: logits of order 0.1 are off by 0.4 % at the most, and the loss is about log(96).
    assert nll(model.bfloat16(), [seq2seq_batch("whisper")]) == pytest.approx(expected, rel=1e-2)


def test_nll_refuses_what_it_cannot_score():
    model, batch = families.build("bart"), seq2seq_batch("bart")
    with pytest.raises(ValueError, match="needs labels; batch 2 has only"):
        nll(model, [batch, {"input_ids": batch["input_ids"]}])
    with pytest.raises(ValueError, match="at least one batch with a label"):
        nll(model, [])
    with pytest.raises(ValueError, match="at least one batch with a label"):
        nll(model, [batch | {"labels": torch.full((2, 5), -100)}])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not one\. Try perplexity"):
        nll(families.build("llama"), [batch])
    break_at(model.lm_head, call=3)
    with pytest.raises(ValueError, match="logits of batch 3 are NaN"):
        nll(model, [batch] * 4)


# Retrieval


def test_recall_and_mrr_are_as_by_hand():
    # The third query, north, finds the document north-east (0.71) before its own, west (0).
    scores = retrieval_recall(LookUp(COMPASS), queries=[[0], [1], [2]], documents=[[0], [1], [3]])
    assert scores.recall_at_1 == pytest.approx(2 / 3)
    # Its own shares rank 2 with the document east, which has the same cosine of 0.
    assert scores.mean_reciprocal_rank == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert (scores.queries, scores.tied) == (3, 1)


def test_the_last_rank_is_counted_too():
    scores = retrieval_recall(LookUp(COMPASS), queries=[[0], [1], [2]], documents=[[3], [0], [1]])
    # East finds its west last; north-east finds east second, as north-east is nearer; north finds north-east.
    assert scores.recall_at_1 == pytest.approx(1 / 3)
    assert scores.mean_reciprocal_rank == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)


def test_a_tie_counts_as_found_and_is_reported():
    scores = retrieval_recall(LookUp(COMPASS), queries=[[0], [0], [2]], documents=[[0], [0], [2]])
    assert (scores.recall_at_1, scores.mean_reciprocal_rank, scores.tied) == (1, 1, 2)


def test_length_does_not_matter_to_a_cosine():
    scores = retrieval_recall(LookUp([[1.0, 0.1], [0.1, 1.0], [9.0, 8.0]]), [[0], [1]], [[0], [1]])
    assert scores.recall_at_1 == 1


def test_embeddings_are_the_mean_over_the_mask():
    model = LookUp(COMPASS)
    batch = {"input_ids": torch.tensor([[0, 2, 3], [1, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    expected = torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    torch.testing.assert_close(embed(model, [batch]), expected)
    torch.testing.assert_close(embed(model, [[0, 2], [1, 1, 1]]), expected)
    assert embed(model.bfloat16(), [[0, 2]]).dtype == torch.float32


def test_what_stands_in_the_padding_does_not_matter():
    model = LookUp([*COMPASS, [math.nan, math.nan]])
    batch = {"input_ids": torch.tensor([[0, 4]]), "attention_mask": torch.tensor([[1, 0]])}
    torch.testing.assert_close(embed(model, [batch]), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("family", ["bert", "bert_mlm", "roberta", "t5"])
def test_lists_of_any_length_embed_as_one_by_one(family):
    model = families.build(family)
    texts = [torch.randint(3, 96, (length,)).tolist() for length in (3, 9, 1, 5)]
    alone = torch.cat([embed(model, [text]) for text in texts])
    assert alone.shape == (4, 32)
    # Values of order 1; attention over masked padding changes the last bits of float32.
    torch.testing.assert_close(embed(model, texts, batch_size=3), alone, atol=1e-5, rtol=1e-5)


def test_a_sentence_encoder_finds_the_texts_themselves_among_blocks(monkeypatch):
    monkeypatch.setattr("hf_sparse24.evaluation.encoders._BLOCK", 3)
    model = families.build("bert")
    texts = [torch.randint(3, 96, (6,)).tolist() for _ in range(8)]
    assert retrieval_recall(model, texts, texts, batch_size=4).recall_at_1 == 1
    assert retrieval_recall(model, texts, texts[1:] + texts[:1], batch_size=4).recall_at_1 == 0


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        ([], [[1]], "no batches were given"),
        ([[1], [2]], [[1]], "got 2 queries and 1 documents"),
        ([[1], []], [[1], [2]], "Text 1 has no tokens"),
        ([{"pixel_values": torch.zeros(1, 1)}], [[1]], "embed needs input_ids; batch 1 has only"),
        (
            [{"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 3, [0] * 3])}],
            [[1]],
            "attention mask of batch 1 leaves a text without tokens",
        ),
    ],
)
def test_bad_texts_are_refused(queries, documents, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(LookUp(COMPASS), queries, documents)


def test_texts_that_do_not_fit_an_encoder_are_refused():
    model = families.build("bert")
    with pytest.raises(ValueError, match="Sequences of 600 tokens were asked for; BertModel has a context of 512"):
        embed(model, [[5] * 600])
    with pytest.raises(ValueError, match="a token id is 4000, and BertModel has"):
        embed(model, [[5], [4000]])
    break_at(model.bert, call=2)
    with pytest.raises(ValueError, match="embeddings of batch 2 are NaN"):
        embed(model, [[5], [6], [7]], batch_size=1)


# Features of vision models


def images(count=2):
    return [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(count)]


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip"])
def test_a_vision_model_is_like_itself_and_less_so_when_pruned(family):
    dense, pruned, batches = families.build(family), families.build(family), images()
    assert feature_cosine(dense, pruned, batches) == pytest.approx(1, abs=1e-6)
    prune_(pruned, Sparse24Config(method="magnitude"))
    cosine = feature_cosine(pruned, dense, batches)
    assert cosine < 0.999
    assert feature_cosine(pruned, features(dense, batches), batches) == pytest.approx(cosine, abs=1e-6)


def test_the_cosine_is_as_by_hand():
    dense, turned = LookUpImages(torch.eye(2)), LookUpImages(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
    batches = [{"pixel_values": torch.tensor([[1.0, 0.0]])}, {"pixel_values": torch.tensor([[0.0, 2.0]])}]
    assert feature_cosine(turned, dense, batches) == pytest.approx(math.sqrt(0.5))


class LookUpImages(torch.nn.Module):
    """A vision model with one token, which is the image times a matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=(pixel_values @ self.matrix)[:, None])


def test_features_are_those_of_the_model():
    model = families.build("dinov2")
    (batch,) = images(1)
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(features(model, [batch]), output.last_hidden_state[:, 0])
    torch.testing.assert_close(features(model, [batch], pooling="pooler"), output.pooler_output)
    torch.testing.assert_close(features(model, [batch], pooling="mean"), output.last_hidden_state.mean(1))
    labelled = batch | {"labels": torch.zeros(2, dtype=torch.int64)}
    torch.testing.assert_close(features(model, [labelled]), features(model, [batch]))


def test_bad_images_are_refused():
    model = families.build("vit")
    with pytest.raises(ValueError, match="no batches were given"):
        features(model, [])
    with pytest.raises(ValueError, match="pooling must be one of"):
        features(model, images(), pooling="max")
    with pytest.raises(ValueError, match="ViTModel has no pooler_output"):
        features(model, images(), pooling="pooler")
    with pytest.raises(ValueError, match=r"shape \(4, 32\), the reference \(2, 32\)"):
        feature_cosine(model, torch.zeros(2, 32), images())
    break_at(model.vit, call=2)
    with pytest.raises(ValueError, match="features of batch 2 are NaN"):
        features(model, images())


def test_a_convolutional_model_has_pooled_features_only():
    from transformers import ConvNextConfig, ConvNextModel

    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])).eval()
    assert features(model, images(1), pooling="pooler").shape == (2, 16)
    with pytest.raises(ValueError, match="need pooling='pooler'"):
        features(model, images(1))


# Figures


@pytest.mark.parametrize(
    ("metric", "dense", "pruned", "percent"),
    [("perplexity", 10, 20, 50), ("nll", 2, 2.5, 80), ("accuracy", 0.8, 0.6, 75), ("accuracy", 0.8, 0.88, 110)],
)
def test_recovery_is_a_ratio_of_which_more_is_better(metric, dense, pruned, percent):
    assert recovery(metric, dense, pruned) == pytest.approx(percent)


@pytest.mark.parametrize(("dense", "pruned"), [(0, 0.5), (math.nan, 1), (1, math.nan), (-1, 1)])
def test_a_recovery_that_is_no_number_is_refused(dense, pruned):
    with pytest.raises(ValueError, match="is a ratio, undefined for dense="):
        recovery("accuracy", dense, pruned)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"metric must be one of .*'perplexity'.*; got 'bleu'"):
        recovery("bleu", 1, 1)


def test_an_evaluation_says_what_it_is():
    evaluation = Evaluation("perplexity", value=12.5, samples=32, unit="windows of 1024 tokens", dense=10.0)
    assert json.loads(evaluation.to_json()) == {
        "metric": "perplexity",
        "value": 12.5,
        "samples": 32,
        "unit": "windows of 1024 tokens",
        "dense": 10.0,
        "dataset": None,
        "better": "lower",
        "stderr": None,
        "recovery": 80.0,
        "recovery_is": "100 * dense / pruned",
    }
    assert Evaluation("accuracy", 0.5, 100, "images").recovery is None
    assert Evaluation.from_dict(evaluation.to_dict()) == evaluation


@pytest.mark.parametrize(
    ("values", "message"),
    [({"metric": "perplexity"}, "needs 'value'; got metric"), ({"metric": "bleu", "value": 1}, "needs 'samples'")],
)
def test_an_evaluation_that_lacks_something_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Evaluation.from_dict(values)


def test_a_metric_of_another_name_comes_with_its_direction():
    bits = Evaluation("bits_per_byte", 2.0, 10, "documents", dense=1.0, better="lower")
    assert bits.recovery == 50.0
    assert Evaluation.from_dict(json.loads(bits.to_json())) == bits
    with pytest.raises(ValueError, match=r"or come with better; got 'bits_per_byte'"):
        Evaluation("bits_per_byte", 2.0, 10, "documents")
    with pytest.raises(ValueError, match="better must be 'lower' or 'higher'; got 'more'"):
        Evaluation("bits_per_byte", 2.0, 10, "documents", better="more")


def test_a_recovery_that_is_no_number_loses_no_figure():
    nothing = Evaluation("accuracy", 0.0, 10, "documents", dense=0.0)
    assert nothing.recovery is None
    console = Console(width=100, file=io.StringIO())
    print_evaluations([nothing], console)
    assert "0.0000" in console.file.getvalue()


def test_figures_of_two_models_are_compared_by_metric_and_data():
    def figure(metric, value, dataset, samples=10):
        return Evaluation(metric, value, samples, "documents", dataset=dataset, better="higher")

    pruned = [figure("acc", 0.4, "a"), figure("acc", 0.3, "b")]
    dense = [figure("acc", 0.6, "b"), figure("f1", 0.1, "a"), figure("acc", 0.5, "a")]
    assert [found.recovery for found in compared(pruned, dense)] == pytest.approx([80, 50])
    with pytest.raises(ValueError, match="of the dense model on nothing"):
        compared(pruned, dense[:2])
    with pytest.raises(ValueError, match="measured on b, 10 documents; of the dense model on b, 9 documents"):
        compared(pruned[1:], [figure("acc", 0.6, "b", samples=9)])


def test_what_was_printed_is_read_again():
    figures = [Evaluation("accuracy", 0.5, 10, "images", dense=0.75), Evaluation("nll", 2.0, 3, "clips")]
    assert read_evaluations(json.dumps([figure.to_dict() for figure in figures])) == figures
    assert read_evaluations(figures[0].to_json()) == figures[:1]
    with pytest.raises(ValueError, match="needs 'metric'; got nothing"):
        read_evaluations("[{}]")


def test_evaluations_print_as_a_table_of_a_hundred_columns():
    console = Console(width=100, file=io.StringIO())
    print_evaluations(
        [
            Evaluation("perplexity", 12.5, 32, "windows of 1024 tokens", dense=10.0),
            Evaluation("mean_reciprocal_rank", 0.5, 1000, "queries"),
        ],
        console,
    )
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "80.0 %" in text
    assert "100 * dense / pruned" in text
