"""`Sparse24Config`: what the user asks for, checked when it is written down, and what a checkpoint says of itself.

The same class serves both, as in every transformers quantizer. A config that describes a checkpoint has a
`format_version`: it then also names the roles that were packed and the versions that produced it, and it keeps keys it
does not know, so that an older package can read a newer checkpoint of the same format and write it back unchanged.
Objects (a dataset, a tokenizer) never reach the file; what they were is recorded as plain facts.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse24.capability import BACKENDS
from hf_sparse24.packing import FORMAT_VERSION, QUANTIZED_DTYPES
from hf_sparse24.version import __version__

QUANT_METHOD = "sparse24"
METHODS = ("auto", "magnitude", "wanda", "ria", "sparsegpt", "alps")
CALIBRATED_METHODS = METHODS[2:]

_ONLY_DESCRIBED = ("format_version", "roles", "produced_by")
_DESCRIBED = (
    "quant_method",
    "format_version",
    "method",
    "seed",
    "quantization",
    "target_modules",
    "modules_to_not_convert",
    "roles",
    "produced_by",
)


class Sparse24Config(QuantizationConfigMixin):
    """Prune a model to 2:4 in `from_pretrained(..., quantization_config=Sparse24Config(...))`.

    Args:
        method (`str`): `"magnitude"`, `"wanda"`, `"ria"`, `"sparsegpt"`, `"alps"`, or `"auto"`: the best calibrated
            recipe when there are calibration data, else magnitude with a warning.
        refit (`bool` or `str`, *optional*): refit the kept weights after the mask is chosen: `"asymmetric"` towards
            the dense model's output, `"symmetric"` towards the layer's own. True is the first; None is True wherever
            there are calibration data.
        quantization (`str`, *optional*): `"int8"` or `"fp8"` for W8A8 with a scale per output channel and dynamic
            scales per token; None keeps the dtype of the model.
        pack (`bool`): True stores values and indices only, for inference. False keeps ordinary dense tensors with
            zeros, for training and for servers without 2:4 kernels.
        backend (`str`): `"auto"`, `"cusparselt"`, `"cutlass"`, `"nvrtc"` or `"reference"`, see
            `hf_sparse24.backend_capability`.
        target_modules (`Sequence[str]` or `str`, *optional*): as in peft, names that a module's path ends with, or a
            regular expression for the whole path. None: every attention and feed-forward projection in a numbered
            layer.
        modules_to_not_convert (`Sequence[str]`, *optional*): names to keep dense in addition.
        dataset: calibration data, as `hf_sparse24.calibration.text.calibration_batches` takes them: the name of a
            dataset, a text file, a list of strings, `"self"` for text that the dense model writes, a list of
            (source, weight) pairs, or an iterable of model inputs.
        tokenizer: for text; default: the one that belongs to the model.
        num_samples (`int`), sequence_length (`int`, *optional*, tokens), batch_size (`int`), seed (`int`): the
            calibration sample. Without a sequence_length windows have 1024 tokens, or the model's context if that is
            less.
        dampening (`float`): added to the diagonal of the Hessian, as a share of its mean; more is added where there
            are few calibration tokens for a layer's inputs.
        match_blocks (`bool`, *optional*): train each pruned block for a moment against the dense one. None: on a GPU,
            where there are calibration data.
        distill (`bool`, *optional*): train the whole pruned model for a moment against the dense one, which takes 20
            bytes a weight and the activations of a batch, where the model lives. None: wherever blocks are matched,
            `method` is "auto", `calibration_device` is None and there seems to be room.
        smooth (`bool`, *optional*): rescale norms and the columns of the weights that read them by powers of two,
            which changes no output and makes 8-bit activations finer. None: where there are calibration data, so that
            the model can be packed in 8 bits now or later.
        calibration_device (`str`, *optional*): where each block is pruned in its turn, for a model that lives on the
            CPU. None: where the model is.
        progress_folder (`str`, *optional*): keeps finished blocks, so that the same call goes on where it stopped.

    Raises:
        `ValueError`: a value is unknown or contradicts another; the message says what to write instead.
        `TypeError`: a keyword is unknown.

    ```python
    >>> Sparse24Config(quantization="int8").quantization
    'int8'

    ```
    """

    def __init__(
        self,
        method: str = "auto",
        refit: bool | str | None = None,
        quantization: str | None = None,
        pack: bool = True,
        backend: str = "auto",
        target_modules: Sequence[str] | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        dataset: Any = None,
        tokenizer: Any = None,
        num_samples: int = 128,
        sequence_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        dampening: float = 0.01,
        match_blocks: bool | None = None,
        distill: bool | None = None,
        smooth: bool | None = None,
        calibration_device: str | None = None,
        progress_folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = kwargs.pop("quant_method", QUANT_METHOD)
        self.format_version: int | None = kwargs.pop("format_version", None)
        self.roles: list[str] | None = kwargs.pop("roles", None)
        self.produced_by: dict[str, Any] | None = kwargs.pop("produced_by", None)
        self.method = method
        self.refit = refit
        self.quantization = quantization
        self.pack = pack
        self.backend = backend
        self.target_modules = target_modules if isinstance(target_modules, str) else _as_list(target_modules)
        self.modules_to_not_convert = _as_list(modules_to_not_convert)
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.dampening = dampening
        self.match_blocks = match_blocks
        self.distill = distill
        self.smooth = smooth
        self.calibration_device = calibration_device
        self.progress_folder = None if progress_folder is None else str(progress_folder)
        self.unknown_keys = kwargs
        self._check_reading()
        if self.format_version is None:
            self._check_keywords()
            self._check_values()
            self._check_combinations()

    @classmethod
    def of_checkpoint(cls, record: dict[str, Any], quantization: str | None) -> "Sparse24Config":
        """Return the config of a packed checkpoint from the record of what was done (see `record`)."""
        keys = ("method", "seed", "roles", "target_modules", "modules_to_not_convert")
        named = {key: record[key] for key in keys if key in record}
        produced_by = {key: value for key, value in record.items() if key not in keys}
        return cls(**named, quantization=quantization, format_version=FORMAT_VERSION, produced_by=produced_by)

    def completed_by(self, record: dict[str, Any]) -> "Sparse24Config":
        """Return this request with the choice of modules of a record where it makes none itself."""
        if self.choices():
            return self
        completed = copy.copy(self)
        completed.target_modules = record.get("target_modules")
        completed.modules_to_not_convert = record.get("modules_to_not_convert")
        return completed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sparse24Config":
        """Copy all but the dataset and the tokenizer, which stay the same objects.

        transformers copies a config deeply while it loads a model. A generator cannot be copied, and data in memory
        would be there twice.
        """
        memo.update({id(value): value for value in (self.dataset, self.tokenizer)})
        copied = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def choices(self) -> dict[str, Any]:
        """Return the choice of modules, without what was left to the default."""
        chosen = {"target_modules": self.target_modules, "modules_to_not_convert": self.modules_to_not_convert}
        return {key: value for key, value in chosen.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds: plain JSON values, and for a checkpoint only what describes it."""
        if self.format_version is not None:
            described = {key: getattr(self, key) for key in _DESCRIBED if getattr(self, key) is not None}
            return {**described, **self.unknown_keys}
        request = {key: value for key, value in vars(self).items() if key not in ("unknown_keys", *_ONLY_DESCRIBED)}
        for key in ("dataset", "tokenizer"):
            request[key] = _describe(request[key])
        return request

    def record(
        self,
        method: str | None = None,
        roles: Sequence[str] | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe what produced a model, in plain JSON values.

        Args:
            method (`str`, *optional*): the method that ran, where "auto" was resolved.
            roles (`Sequence[str]`, *optional*): the roles that were pruned.
            calibration (`dict`, *optional*): what is to be said of the calibration.
        """
        roles = self.roles if roles is None else list(roles)
        record = {"method": method or self.method, "seed": self.seed, "roles": roles, **self.choices()}
        if self.produced_by is not None:
            return record | self.produced_by
        versions = {"hf_sparse24": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
        return record | {"versions": versions} | ({} if calibration is None else {"calibration": calibration})

    def describe_data(self, calibration: Any = None) -> dict[str, Any]:
        """Describe the calibration data in plain JSON values: names where there are any, else types and sizes."""
        return {
            "dataset": _describe(self.dataset if calibration is None else calibration),
            "tokenizer": _describe(self.tokenizer),
            "num_samples": self.num_samples,
        }

    def _check_reading(self) -> None:
        """What must hold for a request and for a checkpoint alike."""
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"Sparse24Config needs quant_method {QUANT_METHOD!r}; got {self.quant_method!r}.")
        if self.format_version not in (None, FORMAT_VERSION):
            raise ValueError(
                f"This checkpoint has packed format {self.format_version!r}; hf_sparse24 {__version__} reads format "
                f"{FORMAT_VERSION}. Install the version under 'produced_by' in its config.json."
            )
        _check_choice("quantization", self.quantization, (None, *QUANTIZED_DTYPES))
        _check_choice("backend", self.backend, ("auto", *BACKENDS))
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules {self.target_modules!r} is not a regular expression ({error}); "
                    "write a list to give names."
                ) from None

    def _check_keywords(self) -> None:
        known = [key for key in vars(self) if key not in ("unknown_keys", *_ONLY_DESCRIBED)]
        for key in self.unknown_keys:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
            raise TypeError(f"Sparse24Config got an unknown argument {key!r}; {hint}")

    def _check_values(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("refit", self.refit, (None, True, False, "symmetric", "asymmetric"))
        for key in ("match_blocks", "distill", "smooth"):
            _check_choice(key, getattr(self, key), (None, True, False))
        _check_choice("pack", self.pack, (True, False))
        _check_device("calibration_device", self.calibration_device)
        for key in ("num_samples", "sequence_length", "batch_size"):
            if key != "sequence_length" or self.sequence_length is not None:
                _check_integer(key, getattr(self, key), 1)
        _check_integer("seed", self.seed, 0)
        if isinstance(self.dampening, bool) or not isinstance(self.dampening, int | float) or not self.dampening > 0:
            raise ValueError(f"dampening must be a positive number; got {self.dampening!r}.")
        for key in ("target_modules", "modules_to_not_convert"):
            _check_names(key, getattr(self, key))

    def _check_combinations(self) -> None:
        if self.quantization is not None and not self.pack:
            raise ValueError(
                f"quantization={self.quantization!r} needs pack=True; with pack=False the weights stay in the "
                f"model's dtype."
            )


def _as_list(names: Any) -> Any:
    """Copy a sequence of names to a list; leave what is not one for the check to refuse."""
    return list(names) if isinstance(names, Sequence | set) and not isinstance(names, str) else names


def _check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"{key} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _check_integer(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be an integer of at least {least}; got {value!r}.")


def _check_device(key: str, value: Any) -> None:
    try:
        torch.device(value or "cpu")
    except (RuntimeError, TypeError):
        raise ValueError(f"{key} must be a device such as 'cuda' or 'cuda:1'; got {value!r}.") from None


def _check_names(key: str, value: Any) -> None:
    if value is None or (isinstance(value, str) and key == "target_modules" and value):
        return
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{key} must be a non-empty list of module names; got {value!r}.")


def _describe(value: Any) -> Any:
    """Name an object for the record: its name, else its type and length; of a mixture every source.

    Of a path only the last part: a record is published, and folders are of the machine that it was made on.
    """
    if value is None:
        return None
    if isinstance(value, str | Path):
        return Path(value).name if Path(value).is_absolute() else str(value)
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return [[_describe(source), weight] for source, weight in value]
    name = getattr(value, "name_or_path", None)
    if isinstance(name, str) and name:
        return _describe(name)
    return f"{type(value).__name__} of {len(value)} items" if hasattr(value, "__len__") else type(value).__name__
