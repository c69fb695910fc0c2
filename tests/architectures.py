"""Every architecture of the installed transformers, on the meta device, and what `selection` makes of it.

Each type is built from its default config, as the first of the classes that transformers' auto classes know for it.
"""

import re
import signal
import warnings
from collections import defaultdict

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from hf_sparse24.selection import Target, select

# The auto classes in the order in which one is taken: what has a head before the bare model.
AUTO = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "PRETRAINING",
    "",
)
SECONDS = 120

# Independent of `selection`: what counts as attention or feed-forward weight, by any name in the path, and what not.
PROJECTION = re.compile(
    r"attn|attention|(^|[._])(mlp|ffn?|ffw|feed_?forward|moe|inter|intermediate|output)([._]|$)|expert"
)
MIXER = re.compile(r"mamba|mixer|ssm|lstm|rg_lru|linear_attn|temporal_block")
NEVER = re.compile(r"(^|\.)(lm_head|classifier|score|pooler|gate|[^.]*(embed|norm|router|indexer)[^.]*)(\.|$)")
BESIDE = re.compile(r"merger|adapter_modules")
NO_PROJECTION = ("embedding", "convolution", "router")


def classes_of(model_type):
    """Return the classes that the auto classes know for a model type."""
    mappings = [f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES" for kind in AUTO]
    found = [getattr(modeling_auto, mapping, {}).get(model_type) for mapping in mappings]
    names = dict.fromkeys(name if isinstance(name, str) else name[0] for name in found if name is not None)
    return [getattr(transformers, name) for name in names if hasattr(transformers, name)]


def build(model_type):
    """Return a model on the meta device: the first class that takes the default config."""
    errors = []
    for model_class in classes_of(model_type):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return model_class(CONFIG_MAPPING[model_type]())
        except TimeoutError:
            raise
        except Exception as error:  # whatever a default config of one of hundreds of types runs into
            errors.append(error)
    raise errors[0] if errors else LookupError("a part of other types: no auto class takes it")


def survey(model_type):
    """Return the row of a model type."""
    row = {"type": model_type}
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {SECONDS} s")))
    signal.alarm(SECONDS)
    try:
        model = build(model_type)
        return row | {"class": type(model).__name__} | measure(model)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return row | {"skipped": f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:160]}
    finally:
        signal.alarm(0)


def measure(model):
    """Return what of a model is selected."""
    weights = dict(model.named_parameters())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    selected, roles, left, wrong = 0, defaultdict(int), defaultdict(int), []
    for matrix in select(model).matrices:
        key = matrix.name if matrix.name in weights else f"{matrix.name}.weight"
        count = weights[key].numel()
        if isinstance(matrix, Target):
            selected += count
            roles[matrix.role] += count
            if (
                NEVER.search(inside_layer(matrix.name))
                or BESIDE.search(matrix.name)
                or model.get_submodule(matrix.module_name) is head
            ):
                wrong.append(matrix.name)
        elif is_projection(matrix.name) and matrix.reason not in NO_PROJECTION:
            left[f"{matrix.reason}: {leaf(matrix.name)}"] += count
    left = dict(sorted(left.items(), key=lambda item: -item[1]))
    return {"selected": selected, "roles": dict(roles), "left": left, "wrong": wrong}


def is_projection(name):
    """Tell from its path whether a matrix in a numbered layer belongs to attention or a feed-forward part."""
    inside = inside_layer(name)
    return bool(PROJECTION.search(inside) and not MIXER.search(inside) and not BESIDE.search(name))


def inside_layer(name):
    """Return what follows the first number of a path; nothing outside the numbered layers."""
    found = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return found.group(1) if found else ""


def leaf(name):
    """Return the last two parts of a name, numbers as N."""
    return re.sub(r"\d+", "N", ".".join(name.split(".")[-2:]))
