"""The seam to transformers: how `from_pretrained` and `save_pretrained` prune, pack, write and read 2:4 models.

The only module that knows transformers' loading internals; it works with transformers 5.17 and later.

- A dense checkpoint: loaded as always, then pruned and, with `pack=True`, packed, one projection at a time. With
  `pack=False` every trace of quantization is removed: the result is an ordinary model with zeros in it, and only a
  plain
  `sparse24` entry in its config says how they came there.
- A packed checkpoint: the target layers are swapped for empty packed ones while the model is on the meta device. The
  checkpoint's keys are then simply theirs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_sparse24 import processes
from hf_sparse24.calibration.text import check_paths
from hf_sparse24.capability import check_backend
from hf_sparse24.checkpoint import check_packed_files, contents_of
from hf_sparse24.config import QUANT_METHOD, Sparse24Config
from hf_sparse24.identity import (
    declare_dense,
    declare_packed,
    keep_module_names,
    packed_names,
    without_merges,
)
from hf_sparse24.nn import PackedModule, Sparse24Linear
from hf_sparse24.pack import make_packed_skeleton_, merge_tied_, pack_selected_, unpack_
from hf_sparse24.packing import QUANTIZED_DTYPES, damaged
from hf_sparse24.prune import check_method, prune_on_request_
from hf_sparse24.selection import Selection, Skipped, Target, select
from hf_sparse24.shards import is_sharded
from hf_sparse24.verification import check_all_packed


class Sparse24HfQuantizer(HfQuantizer):
    """Prunes and packs on load, or reads a packed checkpoint. Registered for `quant_method: "sparse24"`."""

    requires_calibration = False
    quantization_config: Sparse24Config
    packed_names: Sequence[str] = ()
    packs_linear = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before anything is loaded, what cannot work.

        Raises:
            `ValueError`: weights would go to disk, the backend cannot run here, or the method needs calibration data.
            `FileNotFoundError`: calibration text was asked from a file that is not there.
        """
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in devices:
            raise ValueError(
                "2:4 models cannot be offloaded to disk, where their weights would be neither pruned nor checked; "
                "this device_map has 'disk'. Use one without it, or give it more max_memory."
            )
        check_backend(self.quantization_config.backend)
        if not self.pre_quantized:
            check_method(self.quantization_config)
            if self.quantization_config.dataset is not None:
                processes.join()  # sets this process's GPU before anything is put there
                with processes.together():
                    check_paths(self.quantization_config.dataset)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """On the meta device: check the names that the user gave, or make room for packed weights."""
        config = self.quantization_config
        files = kwargs.get("checkpoint_files") or []
        # Without files the weights are tensors of the caller (`state_dict=...`), which must stay as they are.
        self.owns_weights = bool(files)
        self._refuse_sharding(model)
        if self.pre_quantized:
            selection = select(model, config.target_modules, config.modules_to_not_convert, config.roles, strict=False)
            readable = bool(files) and all(file.endswith(".safetensors") for file in files)
            if readable:
                selection = _as_in_files(model, selection, files)
            made = make_packed_skeleton_(model, selection, config.quantization, config.backend)
            self.packed_names = packed_names(model)
            tied = _tie_packed_tensors(model)
            if readable:
                check_packed_files(files, config.quantization, made - tied)
        else:
            select(model, config.target_modules, config.modules_to_not_convert)

    def _refuse_sharding(self, model: PreTrainedModel) -> None:
        """Raise where processes are to share the weights of packed layers, or of weights that calibration reads."""
        if getattr(model.config, "distributed_config", None) is None:
            return
        if self.pre_quantized:
            raise ValueError(
                "Packed 2:4 layers are not sharded over processes, which distributed_config asks for. Load the model "
                "without it, or unpack the checkpoint first (hf-sparse24 unpack) and load that."
            )
        if self.quantization_config.pack or self.quantization_config.dataset is not None:
            raise ValueError(
                "Under distributed_config a model can be pruned by magnitude and stays unpacked: packed layers are "
                "not sharded, and calibration takes whole weights. Use Sparse24Config(method='magnitude', pack=False)."
            )
        if not self.owns_weights:
            raise ValueError(
                "Pruning under distributed_config writes into the tensors that are loaded, which with state_dict=... "
                "are the caller's. Load from a folder."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """With the weights in place: check what was read, or prune and pack."""
        config = self.quantization_config
        if self.pre_quantized:
            _finish_reading(model)
            return
        del model.config.quantization_config  # a request, not yet a description
        selection, record = prune_on_request_(model, config, in_place=self.owns_weights)
        if config.pack:
            pack_selected_(model, selection, config.quantization, config.backend)
            declare_packed(model, Sparse24Config.of_checkpoint(record, config.quantization))
        else:
            declare_dense(model, record)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`model.dequantize()`: dense layers with explicit zeros, in `dtype`."""
        unpack_(model)
        return model if dtype is None else model.to(dtype)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element, for device maps. A packed layer is as large as what is stored of it ...

        ... and on a GPU libraries keep metadata of the size of the indices besides. A dense checkpoint is placed as it
        is: it is packed after it was placed.
        """
        size = super().param_element_size(model, param_name, param)
        return 2 * size if param_name.endswith(".weight_indices") and torch.cuda.is_available() else size

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never cast FP8 values on the way in, whatever dtype the model keeps this module in."""
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if "F8" in stored or "float8" in stored else super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Refuse to save packed layers that something has sharded since; else leave all to transformers."""
        for name, module in model.named_modules():
            if isinstance(module, PackedModule) and any(map(is_sharded, module.parameters(recurse=False))):
                raise ValueError(
                    f"{name} is packed and sharded over processes, and packed models are saved whole. Save it before "
                    "it is sharded, or shard one that is not packed (unpack_)."
                )
        return None, {}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Read packed layers as they are: for some models dense ones are merged or transposed on the way in."""
        conversions = super().update_weight_conversions(weight_conversions, *model)
        return without_merges(conversions, self.packed_names)

    def is_serializable(self) -> bool:
        """A packed model is saved as plain tensors.

        Raises:
            `ValueError`: nothing but experts is packed. transformers without this package would find no `weight` of
                half the width, which it refuses, and would load random experts.
        """
        if not self.packs_linear:
            raise ValueError(
                "A checkpoint whose experts alone are packed would load with random experts where this package is "
                "missing. Pack a linear projection too, such as q_proj, or save it after unpack_."
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top of packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operators have fakes: `torch.compile(fullgraph=True)` and static caches work."""
        return True


def _as_in_files(model: PreTrainedModel, selection: Selection, files: list[str]) -> Selection:
    """Return the selection that the files were packed with, which may be that of another version of this package.

    Where the names in the files are not the model's, or something is missing in them, the selection is left as it is.
    """
    contents = contents_of(files)
    if not contents.stacks:  # before experts could be packed, they were saved as dense tensors with zeros
        selection = Selection(tuple(matrix for matrix in selection.matrices if not _is_stack(matrix)))
    packed, prefix, ties = contents.layers | contents.stacks, model.base_model_prefix, _tied_modules(model)

    def in_the_file(name: str) -> tuple[str, str, str]:
        name = ties.get(name, name)
        return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")

    def is_dense(target: Target) -> bool:
        shape = tuple(getattr(model.get_submodule(target.module_name), target.parameter).shape)
        return any((known, shape) in contents.weights for known in in_the_file(target.name))

    names = {name for name, _ in model.named_modules()} | {matrix.name for matrix in selection.matrices}
    found = frozenset(name for name in names if not packed.isdisjoint(in_the_file(name)))
    left = [target for target in selection.targets if target.read_by is None and target.name not in found]
    if len(found - ties.keys()) != len(packed) or not all(map(is_dense, left)):
        return selection
    return select(model, found, strict=False)


def _is_stack(matrix: Target | Skipped) -> bool:
    return isinstance(matrix, Target) and matrix.is_expert_stack


def _tied_modules(model: PreTrainedModel) -> dict[str, str]:
    """Return the modules whose weight, as the model declares, is that of another one: their names, and its name."""
    ties = model.all_tied_weights_keys.items()
    return {
        tied.removesuffix(".weight"): source.removesuffix(".weight")
        for tied, source in ties
        if tied.endswith(".weight")
    }


def _tie_packed_tensors(model: PreTrainedModel) -> int:
    """Have the loader tie indices and scales where it ties the values; return how many layers are tied to others."""
    tied = 0
    for name, source in _tied_modules(model).items():
        module = model.get_submodule(name)
        if isinstance(module, Sparse24Linear):
            keys = ["weight_indices"] if module.weight_scale is None else ["weight_indices", "weight_scale"]
            model.all_tied_weights_keys |= {f"{name}.{key}": f"{source}.{key}" for key in keys}
            tied += 1
    return tied


def _finish_reading(model: PreTrainedModel) -> None:
    """Restore dtypes and freezing that the loader does not know of, and verify every packed layer."""
    merge_tied_(model)
    read: dict[str, PackedModule] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            _check_dense(name, module)
            continue
        for key in ("weight", "weight_indices", "weight_scale"):
            tensor = getattr(module, key)
            if tensor is not None:
                tensor.requires_grad_(False)
                if tensor.is_inference():  # loaded in inference mode: could not be unpacked once
                    with torch.inference_mode(False):
                        setattr(module, key, torch.nn.Parameter(tensor.clone(), requires_grad=False))
        if module.quantization and module.weight.dtype != QUANTIZED_DTYPES[module.quantization]:
            # Before 5.21 the loader widens FP8 to the dtype of the model, which loses nothing.
            values = module.weight.data.to(QUANTIZED_DTYPES[module.quantization])
            module.weight = torch.nn.Parameter(values, requires_grad=False)
        if not module.weight.is_meta:  # offloaded weights live in accelerate's hooks
            read[name] = module
    check_all_packed((name, module.packed, module.dense_shape) for name, module in read.items())
    for module in read.values():
        module.prepare_()
    keep_module_names(model)


def _check_dense(name: str, module: torch.nn.Module) -> None:
    """Before 5.23 transformers accepts a weight of any shape where there is a quantizer: refuse half a weight here."""
    if isinstance(module, torch.nn.Linear):
        shape, expected = tuple(module.weight.shape), (module.out_features, module.in_features)
        if shape != expected and not module.weight.is_meta:
            raise damaged(f"{name}.weight has shape {shape}, belongs to no packed layer, and should have {expected}")


def register() -> None:
    """Tell transformers about `quant_method: "sparse24"`. Safe to call again, as a module reload does."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(Sparse24Config)
    register_quantizer(QUANT_METHOD)(Sparse24HfQuantizer)


register()
