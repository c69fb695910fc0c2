"""Publish a folder: what of it goes to the Hub, and what has to be true before it does.

The transfer is huggingface_hub's: the token (`hf auth login` or HF_TOKEN), retries, large files, deduplication. This
module decides which files are sent and refuses a folder that nobody could load or understand. Without the upload, the
choice is data (`files_to_push`), which is what a dry run prints.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from hf_sparse24.checkpoint import check_packed_files
from hf_sparse24.config import QUANT_METHOD

# Pickles, a trainer's checkpoints and logs, hidden files: nothing that loads a model reads them.
LEFT_OUT = ["*.bin", "*.pt", "*.pth", "*.pkl", "checkpoint-*", "runs/*", ".*", "*/.*", *DEFAULT_IGNORE_PATTERNS]


def files_to_push(folder: str | Path) -> list[str]:
    """Return the files that `push_folder` would send, as paths in the repository, sorted.

    Args:
        folder (`str` or `Path`): what `save_pretrained`, `Trainer.save_model` or `hf-sparse24 prune` wrote.

    Raises:
        `ValueError`: the folder holds no complete model that this package pruned, or no model card.
    """
    folder = Path(folder).expanduser()
    config = _config(folder)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sent = list(filter_repo_objects(paths, ignore_patterns=LEFT_OUT))
    _check_weights(folder, config, [path for path in sent if path.endswith(".safetensors")])
    if "README.md" not in sent:
        raise ValueError(f"{folder} has no README.md, its model card; write one with: hf-sparse24 card {folder}")
    return sent


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a 2:4 sparse model",
) -> CommitInfo:
    """Create a model repository where there is none, and upload a folder to it in one commit.

    Args:
        folder (`str` or `Path`): the folder of a pruned model, packed or dense-masked, with its card.
        repo_id (`str`): "user/name" or "name".
        revision (`str`, *optional*): a branch, created where there is none; default: main.
        private (`bool`, *optional*): of a new repository; None is the default of its owner.
        token (`str` or `bool`, *optional*): as huggingface_hub takes it; None is the one that is logged in.
        commit_message (`str`): the first line of the commit.

    Returns:
        `CommitInfo`: with the address of the commit.

    Raises:
        `ValueError`: see `files_to_push`.
        `HfHubHTTPError`: the Hub refused.
    """
    files_to_push(folder)
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder).expanduser(),
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=LEFT_OUT,
    )


def _config(folder: Path) -> dict[str, Any]:
    """Read the config of a model that this package pruned."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; name a folder that save_pretrained wrote.")
    config = json.loads(path.read_text(encoding="utf8"))
    if "sparse24" not in config and _quantization_config(config).get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"The config.json in {folder} does not say that hf_sparse24 pruned the model; prune it first, or "
            "upload it with: hf upload"
        )
    return config


def _check_weights(folder: Path, config: dict[str, Any], files: list[str]) -> None:
    """Refuse weights of which a part is missing, or that are not what the config says."""
    index = folder / "model.safetensors.index.json"
    needed = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()) if index.is_file() else set()
    missing = sorted(needed - set(files))
    if missing or not files:
        raise ValueError(f"{folder} lacks {missing[0] if missing else 'model.safetensors'}; save the model again.")
    if "sparse24" not in config:
        quantization = _quantization_config(config).get("quantization")
        check_packed_files([str(folder / file) for file in files], quantization, expected_layers=1)


def _quantization_config(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("quantization_config") or {}
