"""What a model is called: a folder here, or an id on the Hub. What can be neither is refused before any wait."""

import difflib
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_model_name(name: str) -> None:
    """Refuse the name of a folder that is not there, and say when the Hub is asked for what may be mistyped.

    Args:
        name (`str`): a path, or a Hub id. An id without a user ("gpt2") may be a folder that was mistyped, and so may
            one whose first part is a folder here.

    Raises:
        `ValueError`: there is nothing of this name, and it is no Hub id.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    found = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = ", ".join(difflib.get_close_matches(path.name, found))
    missing = f"There is no {name}" + (f" (near: {near})" if near else "")
    if name.startswith((".", "/", "~")) or not _is_hub_id(name):
        raise ValueError(f"{missing}. Name a folder with a transformers model, or a Hub id: user/name.")
    if "/" not in name or path.parent.is_dir():
        logger.warning(f"{missing} here; asking the Hub for it.")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
