"""Models of two modalities: the language part, the vision part or both are pruned; widths that vision towers have."""

import pytest
import torch
import transformers

from hf_sparse24 import Sparse24Config, Sparse24Linear, pack_, prune_, sparsity_report
from hf_sparse24.selection import select
from tests.test_from_pretrained import QUANTIZATIONS, assert_same_model, digests

IMAGE_TOKEN = 90
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
TEXT |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}

# name: (model, where its language part is, where its vision part is, targets in each)
MODELS = {
    "llava": ("LlavaForConditionalGeneration", "language_model", "vision_tower", (14, 12)),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "language_model", "visual", (14, 8)),
    "idefics3": ("Idefics3ForConditionalGeneration", "text_model", "vision_model", (14, 12)),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "language_model", "visual", (14, 10)),
}
IMAGE_TOKENS = {"llava": 16, "idefics3": 4, "qwen2_vl": 4, "qwen2_5_vl": 4}


def build(name, width=64):
    """Build a tiny model; `width` is that of the vision tower's feed-forward layers."""
    torch.manual_seed(0)
    text, vision = {"model_type": "llama", **TEXT}, {**VISION, "intermediate_size": width}
    if name == "llava":
        vision = {"model_type": "siglip_vision_model", **vision}
    elif name.startswith("qwen2"):
        text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "intermediate_size": width}
        vision |= {"embed_dim": 32, "mlp_ratio": 2, "out_hidden_size": 32, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
    config_class = getattr(transformers, MODELS[name][0].replace("ForConditionalGeneration", "Config"))
    kwargs = {"vision_feature_select_strategy": "full"} if name == "llava" else {}
    config = config_class(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, **kwargs)
    return getattr(transformers, MODELS[name][0])(config).eval()


def inputs(name, seed=1):
    """Return two prompts with an image each."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 80, (2, IMAGE_TOKENS[name] + 8))
    ids[:, 3 : 3 + IMAGE_TOKENS[name]] = IMAGE_TOKEN
    if name == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "idefics3":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 1, 3, 32, 32)}
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    return {"input_ids": ids, "pixel_values": torch.randn(32, 3 * 2 * 8 * 8), **grid}


def logits(model, name):
    with torch.no_grad():
        return model(**inputs(name)).logits


@pytest.mark.parametrize("part", ["language", "vision", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_either_part_by_prefix(name, part, tmp_path, magnitude):
    _, language, vision, counts = MODELS[name]
    request = {"language": {"modules_to_not_convert": [vision]}, "vision": {"modules_to_not_convert": [language]}}
    dense = build(name)
    dense.save_pretrained(tmp_path / "dense")
    asked = request.get(part, {})
    packed = type(dense).from_pretrained(tmp_path / "dense", quantization_config=magnitude(**asked))
    where = [key for key, module in packed.named_modules() if isinstance(module, Sparse24Linear)]
    found = tuple(sum(prefix in key.split(".") for key in where) for prefix in (language, vision))
    assert found == (counts[0] * (part != "vision"), counts[1] * (part != "language"))
    for row in sparsity_report(packed).rows:
        if row.name in {target.name for target in select(dense).targets} - set(where):
            assert (row.state, row.reason) == ("dense", "modules_to_not_convert")

    masked = build(name)
    prune_(masked, magnitude(**asked))
    assert torch.equal(logits(packed, name), logits(masked, name))
    assert not torch.equal(logits(packed, name), logits(dense, name))
    packed.save_pretrained(tmp_path / "packed")
    read = type(dense).from_pretrained(tmp_path / "packed")
    assert_same_model(packed, read)
    read.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "packed") == digests(tmp_path / "again")


@pytest.mark.parametrize("name", MODELS)
def test_by_role_and_prefix(name, magnitude):
    _, language, vision, _ = MODELS[name]
    model = build(name)
    pattern = rf".*\.{vision}\..*\.\d+\..*(fc\d|up_proj|down_proj)|.*\.{language}\..*\.[qk]_proj"
    prune_(model, magnitude(target_modules=pattern))
    rows = sparsity_report(model).sparse_rows
    in_vision = {row.role for row in rows if f".{vision}." in row.name}
    assert in_vision in ({"fc1", "fc2"}, {"up", "down"})
    assert {row.role for row in rows if f".{language}." in row.name} == {"q", "k"}
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("name", "part"), [("llava", "language"), ("llava", "vision"), ("qwen2_vl", "both"), ("idefics3", "both")]
)
def test_calibration_with_images(name, part):
    _, language, vision, counts = MODELS[name]
    kept = {"language": [vision], "vision": [language]}.get(part)
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = Sparse24Config(method="sparsegpt", modules_to_not_convert=kept)
    report = prune_(model, config, [inputs(name, seed) for seed in (2, 3)])
    assert report.totals["violating_groups"] == 0
    assert len(report.sparse_rows) == sum(counts) - (0 if kept is None else counts[part == "language"])
    changed = {key.split(".")[1] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"language": {language}, "vision": {vision}, "both": {language, vision}}[part]


# Of SigLIP-so400m, which many have for a vision tower, and of Qwen2.5-VL's own.
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("name", "width"), [("llava", 4304), ("qwen2_5_vl", 3420)])
def test_widths_of_vision_towers(name, width, quantization, tmp_path, magnitude):
    masked = build(name, width)
    masked.save_pretrained(tmp_path / "dense")
    prune_(masked, magnitude())
    packed = type(masked).from_pretrained(tmp_path / "dense", quantization_config=magnitude(quantization=quantization))
    widths = {module.in_features for module in packed.modules() if isinstance(module, Sparse24Linear)}
    assert width in widths
    expected, found = logits(masked, name), logits(packed, name)
    # Random weights of 0.02 in two layers: INT8 costs .01, FP8 .03; one projection left out 1.
    assert (found - expected).norm() <= {None: 0, "int8": 0.05, "fp8": 0.15}[quantization] * expected.norm()
    packed.save_pretrained(tmp_path / "packed")
    assert_same_model(packed, type(masked).from_pretrained(tmp_path / "packed"))


def test_a_width_that_no_group_of_four_fills_stays_dense(magnitude):
    model = build("idefics3", 4302)
    prune_(model, magnitude())
    pack_(model)
    rows = {row.name.rpartition(".")[2]: row for row in sparsity_report(model).rows if "vision_model" in row.name}
    assert (rows["fc2"].state, rows["fc2"].reason) == ("dense", "in_features 4302 is not a multiple of 4")
    assert rows["fc1"].state == "packed"
