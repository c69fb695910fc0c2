"""`Sparse24Callback`: the whole mask discipline as a callback, for Trainer, TRL's trainers and PEFT.

| event | what happens |
|---|---|
| train begins (after prepare and resume) | masks are made, or read from the checkpoint; gradients are hooked |
| step begins | a policy with a dense forward pass brings pruned weights back |
| before the optimizer's step | a policy that trains pruned weights changes their gradients |
| after the optimizer's step | the model is 2:4 again; sparse products take its new values |
| before a save, and at the end | verified: a nonzero outside the mask is an error |
| after a save | masks and the policy's state are written beside the weights |
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sparse24.config import Sparse24Config
from hf_sparse24.identity import record_of
from hf_sparse24.pattern import find_violations, mask_2to4
from hf_sparse24.roles import role_of
from hf_sparse24.training.masks import Masks, bare, local
from hf_sparse24.training.policies import Frozen, Weight, make_policy
from hf_sparse24.training.schedule import learning_rates, why_no_recovery
from hf_sparse24.training.sparse_matmul import SparseMatmul
from hf_sparse24.training.state import FILE, States, check_restored, load_state, save_state

logger = logging.get_logger(__name__)


class Sparse24Callback(TrainerCallback):
    """Keep a model 2:4 while it is trained.

    Works with any trainer that has transformers' callbacks. `Sparse24Trainer` adds distillation, metrics in every
    tracker, and checkpoints of mixtures of experts that can be resumed.

    Args:
        policy (`str` or `Frozen`): a name of `policies.POLICIES`, or a policy. "frozen" needs a model that was pruned;
            others may begin with a dense one.
        prior (`nn.Module` or `Mapping[str, Tensor]`, *optional*): where the first masks come from, for a policy that
            may begin dense: a pruned model, or for each parameter a tensor whose nonzeros stay. Default: the model's
            own weights.
        patience_steps (`int`): after so many steps without a lower loss there is a warning.
        sparse_matmul (`bool` or `list[str]`): products on sparse tensor cores (`training.sparse_matmul`), in all
            projections or in those of some names; with masks that stay and are 2:4 along both dimensions.
        policy_arguments: of a policy that is given by its name.

    Raises:
        `ValueError`: there is no such policy, or it takes no such argument.
    """

    def __init__(
        self,
        policy: str | Frozen = "frozen",
        prior: nn.Module | Mapping[str, Tensor] | None = None,
        patience_steps: int = 200,
        sparse_matmul: bool | list[str] = False,
        **policy_arguments: Any,
    ) -> None:
        self.policy = make_policy(policy, **policy_arguments)
        self.prior = dict(prior.named_parameters()) if isinstance(prior, nn.Module) else prior
        self.patience_steps = patience_steps
        self.sparse_matmul = sparse_matmul
        self.resume_folder: str | Path | None = None
        self.masks: Masks | None = None
        self._states: States = {}
        self._hooks: list[RemovableHandle] = []
        self._products: SparseMatmul | None = None
        self._flips: Tensor | None = None
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make or read the masks; check what could not work."""
        model, policy = kwargs["model"], self.policy
        self._release_hooks()
        self._flips, self._warned = None, False
        policy.total_steps = state.max_steps
        _check_arguments(args, model, policy)
        self.masks = Masks.of(model, self._first_mask)
        if not policy.shards:
            self._refuse_shards()
        if state.global_step:
            self._resume(args, state)
        else:
            mean_pruned = self._start()
            reason = policy.why_too_short(learning_rates(kwargs["lr_scheduler"], state.max_steps), mean_pruned)
            if reason is not None:
                logger.warning(f"mask_policy {policy.name!r} cannot finish: {reason}.")
        _record(model, policy, self.masks)
        self._hook_gradients(state.global_step + 1)
        if self.sparse_matmul:
            self._products = self._sparse_products(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the policy prepare the forward pass."""
        step = state.global_step + 1
        self._hook_gradients(step)
        if not self.policy.is_fixed(step):
            with torch.no_grad():
                for weight in self._weights():
                    self.policy.before_forward_(weight, step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the policy change the gradients, after clipping."""
        step = state.global_step + 1
        if self.policy.is_fixed(step):
            return
        learning_rate = kwargs["lr_scheduler"].get_last_lr()[0]
        with torch.no_grad():
            for weight in self._weights():
                if weight.gradient is None:
                    raise ValueError(
                        f"mask_policy {self.policy.name!r} needs the gradient of {weight.name}, which has none. Train "
                        "all weights, or keep it dense with modules_to_not_convert."
                    )
                self.policy.before_step_(weight, step, learning_rate)
        if not self.policy.trains_weights:
            kwargs["model"].zero_grad(set_to_none=True)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the model 2:4 again; count how many weights entered or left a mask."""
        step = state.global_step + 1
        if self.policy.is_fixed(step):
            self.masks.apply_()
            if self._products is not None:
                self._products.repack_()
            return
        with torch.no_grad():
            for weight in self._weights():
                before = weight.pruned
                kept = self.policy.after_step_(weight, step)
                if kept is not None:
                    flipped = before.eq(kept).sum()
                    self._flips = flipped if self._flips is None else self._flips + flipped
                    self.masks[weight.name].replace(kept)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verify before a save."""
        if control.should_save:
            self.masks.verify()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks beside the weights."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and not args.save_only_model:
            save_state(folder, self.masks, self._states, self.policy)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the metrics where a trainer has not, and warn of a training that brings nothing."""
        logs = kwargs.get("logs") or {}
        if self.masks is not None and "loss" in logs and "sparse24_density" not in logs:
            metrics = self.metrics()
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)
        reason = None if self._warned else why_no_recovery(state.log_history, self.patience_steps)
        if reason is not None:
            self._warned = True
            logger.warning(reason)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verify what is left in memory: the last state, or the best, whose masks may be others."""
        model = kwargs["model"]
        self._release_hooks()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (Path(best) / FILE).exists():
            check_restored(best, self.masks)
        if best is not None and self.policy.moves and not self.policy.ends_dense:
            self._states.clear()
            _check_2to4(self.masks)
            self.masks = Masks.of(model, lambda _, weight, dim: mask_2to4(weight.abs(), dim))
        self.masks.verify()

    def metrics(self) -> dict[str, float]:
        """Return density, nonzeros outside the masks, and the share of weights that flipped since the last call."""
        numbers = sum(mask.shape.numel() for mask in self.masks.values())
        flips = 0.0 if self._flips is None else float(self._flips) / max(numbers, 1)
        self._flips = None
        return {
            "sparse24_density": self.masks.density(),
            "sparse24_violations": self.masks.violations(),
            "sparse24_flips": flips,
        }

    def _first_mask(self, name: str, weight: Tensor, dim: int) -> Tensor:
        """Choose the first mask of a matrix: what the prior keeps, else its own zeros and magnitudes."""
        policy = self.policy
        scores = weight.abs()
        if self.prior is not None:
            if name not in self.prior or self.prior[name].shape != weight.shape:
                raise ValueError(
                    f"The prior has no {name} of shape {tuple(weight.shape)}; give one of the same model."
                )
            scores = self.prior[name].detach().to(weight.device).abs()
        if not policy.starts_dense and find_violations(weight, dim).count:
            raise ValueError(
                f"mask_policy {policy.name!r} needs a model that was pruned; {name} is not 2:4. Call "
                "hf_sparse24.prune_ first, or name a policy that may begin dense, such as 'srste'."
            )
        return policy.search(scores, dim)

    @torch.no_grad()
    def _start(self) -> float:
        """Let the policy begin; return the mean magnitude of the weights that are pruned now."""
        self._states = {}
        total = count = 0.0
        for weight in self._weights():
            total += float(weight.values.abs().mul(weight.pruned).sum())
            count += int(weight.pruned.sum())
            self.policy.start(weight)
        return total / max(count, 1)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(self.resume_folder or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if (folder / FILE).exists():
            self._states = load_state(folder, self.masks, self.policy)
            return
        if self.policy.moves:
            raise ValueError(
                f"mask_policy {self.policy.name!r} cannot resume: {folder} has no {FILE}. Resume from another "
                "checkpoint."
            )
        logger.warning(f"{folder} has no {FILE}; the masks are taken from the zeros of its weights.")
        self._states = {}

    def _weights(self) -> Iterator[Weight]:
        for name, mask in self.masks.items():
            parameter = mask.parameter
            gradient = None if parameter.grad is None else local(parameter.grad)
            state = self._states.setdefault(name, {})
            yield Weight(name, local(parameter), gradient, mask.pruned(), mask.dim, state)

    def _hook_gradients(self, step: int) -> None:
        """Keep gradients of pruned weights at zero, from the step on from which the mask is fixed."""
        if not self._hooks and self.policy.is_fixed(step):
            self._hooks = self.masks.mask_gradients()

    def _release_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._products is not None:
            self._products.remove()
            self._products = None

    def _sparse_products(self, args: TrainingArguments) -> SparseMatmul:
        if self.policy.moves:
            raise ValueError(
                f"sparse_matmul needs a mask that stays, and mask_policy {self.policy.name!r} moves it. Use "
                "mask_policy='transposable'."
            )
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)  # accelerate's, too
        dtype = autocast or next(iter(self.masks.values())).parameter.dtype
        return SparseMatmul(self.masks, dtype, None if self.sparse_matmul is True else self.sparse_matmul)

    def _refuse_shards(self) -> None:
        if any(isinstance(mask.parameter, DTensor) for mask in self.masks.values()):
            raise ValueError(f"mask_policy {self.policy.name!r} cannot work on shards. Use DDP, or another policy.")


def _check_arguments(args: TrainingArguments, model: nn.Module, policy: Frozen) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and would train copies of the model on them (nn.DataParallel), "
            "which masks and losses do not follow. Start it with torchrun or accelerate launch, or show it one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    if policy.moves and args.mixed_precision == "fp16":
        raise ValueError(
            f"mask_policy {policy.name!r} reads gradients, which fp16=True scales. Use bf16=True, or 'frozen'."
        )
    if policy.moves and args.deepspeed:
        raise ValueError(f"mask_policy {policy.name!r} cannot see DeepSpeed's gradients. Use FSDP2, DDP or 'frozen'.")
    trained = {parameter.dtype for parameter in bare(model).parameters() if parameter.requires_grad}
    if trained & {torch.bfloat16, torch.float16} and not args.deepspeed:
        logger.warning(
            "Some weights are trained in 16 bits, where most steps are smaller than a weight's last bit and are lost. "
            'Load the model with dtype="float32" and train with bf16=True.'
        )


def _check_2to4(masks: Masks) -> None:
    for name, mask in masks.items():
        count = find_violations(local(mask.parameter), mask.dim).count
        if count:
            raise RuntimeError(
                f"{name} of the best checkpoint has {count} groups of four with more than two nonzeros."
            )


def _record(model: nn.Module, policy: Frozen, masks: Masks) -> None:
    """Write into the model's config how it is trained, and for one that was dense, that it is pruned."""
    model = bare(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return
    record = record_of(base)
    if policy.ends_dense:  # nothing is to call it pruned
        vars(base.config).pop("sparse24", None)
        return
    if not record:
        roles = {role_of(name.removesuffix(".weight")) for name in masks} - {None}
        record = Sparse24Config(method="magnitude").record(policy.name, sorted(roles))
    base.config.sparse24 = record | {"training": {"mask_policy": policy.name}}
