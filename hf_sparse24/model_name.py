"""What a model is called: a folder here, or an id on the Hub. What can be neither is refused before any wait."""

import difflib
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_model_name(name: str) -> None:
    """Refuse the name of a folder that is not there, and say when the Hub is asked for what may be mistyped.

    Args:
        name (`str`): a path, or a Hub id. What begins with `.`, `/` or `~`, or with a folder that is here, is a path.
            An id without a user ("gpt2") may be a folder that was mistyped, and so may one that is nearly a path here.

    Raises:
        `ValueError`: there is nothing of this name, and it is no Hub id.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    near = _near(path)
    missing = f"There is no {name}" + (f" (near: {', '.join(near)})" if near else "")
    if name.startswith((".", "/", "~")) or not _is_hub_id(name):
        raise ValueError(f"{missing}. Name a folder with a transformers model, or a Hub id: user/name.")
    if "/" in name and path.parent.is_dir():
        raise ValueError(
            f"{missing} in the folder {path.parent}. Name one with a transformers model; for a model of this name on "
            f"the Hub start where there is no folder {path.parent}."
        )
    if "/" not in name or near:
        logger.warning_once(f"{missing} here; asking the Hub for it.")


def _near(path: Path) -> list[str]:
    """Return what is there under a name like this: in its folder, or in folders named like its own."""
    if path.parent.is_dir():
        return difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()])
    if not path.parent.parent.is_dir():
        return []
    folders = [entry.name for entry in path.parent.parent.iterdir()]
    found = [path.parent.with_name(name) / path.name for name in difflib.get_close_matches(path.parent.name, folders)]
    return [str(other) for other in found if other.exists()]


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
