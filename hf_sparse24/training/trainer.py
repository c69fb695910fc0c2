"""`Sparse24Trainer`: transformers' Trainer that keeps a model 2:4, distils it, and saves it as a dense-masked one.

`Sparse24TrainerMixin` is all of it, to be put before another trainer: `class Mine(Sparse24TrainerMixin, SFTTrainer)`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, Trainer
from transformers.utils import logging

from hf_sparse24 import model_card
from hf_sparse24.report import sparsity_report
from hf_sparse24.training.arguments import Sparse24Arguments
from hf_sparse24.training.callback import Sparse24Callback
from hf_sparse24.training.compact import CompactAdamW
from hf_sparse24.training.distillation import (
    Distillation,
    adapters_off,
    attention_mask,
    check_adapters,
    counted_tokens,
)
from hf_sparse24.training.masks import bare, refuse_packed

logger = logging.get_logger(__name__)


class Sparse24TrainerMixin:
    """What `Sparse24Trainer` adds to a trainer.

    Args:
        teacher_model (`nn.Module`, *optional*): the dense model to distil from, where the arguments name none.
            It stays whole on every device, in its own dtype.
        args, kwargs: as the trainer that follows takes them. Arguments that are no `Sparse24Arguments` mean frozen
            masks and no distillation.

    Raises:
        `ValueError`: the model is packed.
    """

    def __init__(self, *args: Any, teacher_model: nn.Module | None = None, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            refuse_packed(bare(model))
        super().__init__(*args, **kwargs)
        asked = self.args if isinstance(self.args, Sparse24Arguments) else Sparse24Arguments()
        self._asked = asked
        self.sparse24 = self._given_callback() or self._make_callback(asked)
        self.teacher_model = teacher_model
        if asked.teacher_adapters_off:
            self.teacher_model = bare(self.model)
            check_adapters(self.teacher_model, teacher_model)
        elif teacher_model is None and asked.teacher_model is not None:
            self.teacher_model = self._load_like_model(asked.teacher_model)
        self.distillation = None
        if self.teacher_model is not None:
            if not asked.teacher_adapters_off:
                self.teacher_model.to(self.args.device).eval().requires_grad_(False)
            self.distillation = Distillation(
                asked.logit_weight,
                asked.label_weight,
                asked.hidden_weight,
                asked.distill_temperature,
                asked.distill_top_k,
                asked.distill_chunk_tokens,
            )
        self._losses: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss; while training with a teacher, that of distillation."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        distillation = self.distillation
        read = distillation.inputs(model, inputs)
        with adapters_off(self.teacher_model) if self._asked.teacher_adapters_off else nullcontext():
            taught = distillation.teach(self.teacher_model, inputs, self.accelerator.autocast)
        outputs = model(**read, **({"num_items_in_batch": num_items_in_batch} if scaled else {}))
        devices = 1
        if scaled and self.args.average_tokens_across_devices:  # as Trainer: gradients are averaged over them
            devices = self.accelerator.num_processes // self.get_tp_size()
        parts = {}
        if distillation.logit_weight:
            total, count = distillation.divergence(
                outputs, taught, counted_tokens(model, inputs), attention_mask(inputs)
            )
            self._note("logit", total, count)
            per_item = scaled and isinstance(count, Tensor)
            parts["logit_weight"] = (
                total / num_items_in_batch * devices if per_item else self._share(total / count, scaled)
            )
        if distillation.label_weight:
            parts["label_weight"] = outputs["loss"] * devices
            share = self.current_gradient_accumulation_steps if scaled else 1
            self._note("label", parts["label_weight"] * share, 1.0)
        if distillation.hidden_weight:
            hidden = distillation.hidden(outputs, taught, attention_mask(inputs))
            self._note("hidden", hidden, 1.0)
            parts["hidden_weight"] = self._share(hidden, scaled)
        if not parts:
            raise ValueError(
                "Distillation has nothing to learn: logit_weight, label_weight and hidden_weight are all 0."
            )
        loss = sum(getattr(distillation, key) * part for key, part in parts.items())
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the optimizer that the arguments name, or the compact one."""
        if self.optimizer is None and self._asked.compact_optimizer:
            self.optimizer = CompactAdamW.of_trainer(self)
        return super().create_optimizer(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with density, flips, violations and the parts of the loss where a training's loss is logged."""
        if "loss" in logs and self.sparse24.masks is not None:
            logs.update(self.sparse24.metrics())
            for key, sums in self._losses.items():
                total, count = self.accelerator.reduce(sums, "sum").tolist()
                logs[f"distill_{key}_loss"] = total / max(count, 1e-9)
            self._losses.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary model with zeros in it, whatever it is sharded by; every process has to call it."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.sparse24.masks is not None:
            self.sparse24.masks.verify()
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card that Trainer writes, with the pattern, how it was kept, and what is dense.

        Every process has to call it where the model is sharded.
        """
        kwargs["tags"] = model_card.with_tags(kwargs.get("tags"))
        super().create_model_card(*args, **kwargs)
        model, state = bare(self.model), self.state
        # In every process: each has a shard, where there are any.
        report = sparsity_report(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if self.is_world_process_zero():
            policy = self.sparse24.policy.name
            model_card.append_section(self.args.output_dir, report, policy, state.global_step, state.log_history)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint that is resumed.

        Trainer reads the file's keys as they are, where `save_pretrained` has renamed and split some (experts, ViT):
        it then warns, and trains on from the weights that the run was started with (transformers#48805).
        """
        self.sparse24.resume_folder = resume_from_checkpoint
        model = self.model if model is None else model
        if self._needs_conversion(model):
            self._load_converted(resume_from_checkpoint, model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, as those of one that is resumed."""
        if self._needs_conversion(self.model):
            self._load_converted(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()

    def _needs_conversion(self, model: nn.Module) -> bool:
        """Whether weights can be read by `from_pretrained`: sharded models and adapters have ways of their own."""
        return isinstance(bare(model), PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _load_converted(self, folder: str, model: nn.Module) -> None:
        """Read a checkpoint as `from_pretrained` does, which knows its keys, and copy it into the model."""
        model = bare(model)
        # The widest dtype holds every value of the others; copying rounds back to what was saved.
        widest = max({parameter.dtype for parameter in model.parameters()} | {torch.float32}, key=lambda x: x.itemsize)
        loaded = type(model).from_pretrained(folder, dtype=widest, device_map="cpu")
        values = loaded.state_dict()
        missing = [key for key in model.state_dict() if key not in values]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]} and {len(missing) - 1} others; it is of another model.")
        model.load_state_dict(values)

    def _load_like_model(self, folder: str) -> nn.Module:
        model = bare(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        kind = type(model) if isinstance(model, PreTrainedModel) else AutoModel
        return kind.from_pretrained(folder, dtype=next(model.parameters()).dtype)

    def _given_callback(self) -> Sparse24Callback | None:
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Sparse24Callback)]
        return given[0] if given else None

    def _make_callback(self, asked: Sparse24Arguments) -> Sparse24Callback:
        prior = None if asked.mask_prior is None else self._load_like_model(asked.mask_prior)
        products = asked.sparse_matmul and (asked.sparse_matmul_modules or True)
        policy_arguments = asked.mask_policy_args or {}
        callback = Sparse24Callback(asked.mask_policy, prior, asked.patience_steps, products, **policy_arguments)
        self.add_callback(callback)
        return callback

    def _share(self, mean: Tensor, scaled: bool) -> Tensor:
        """Divide the mean of a batch among the batches of a step, where Trainer will not do so."""
        return mean / self.current_gradient_accumulation_steps if scaled else mean

    def _note(self, key: str, total: Tensor, count: Tensor | float) -> None:
        """Add to what is logged of a part of the loss: its sum and the number of items."""
        sums = torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).float()])
        self._losses[key] = self._losses[key] + sums if key in self._losses else sums


class Sparse24Trainer(Sparse24TrainerMixin, Trainer):
    """Retrain a pruned model, or train one to become 2:4.

    ```python
    prune_(model, Sparse24Config(dataset="text.txt"))
    arguments = Sparse24TrainingArguments("out", teacher_model=name, learning_rate=3e-4, bf16=True, max_steps=1000)
    trainer = Sparse24Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    ```

    Args:
        args (`Sparse24TrainingArguments`): the mask policy, the teacher and its weights, and all else that
            `TrainingArguments` has. Plain `TrainingArguments` mean frozen masks and no distillation.
        teacher_model (`nn.Module`, *optional*): the dense model to distil from, in memory.
        kwargs: as `transformers.Trainer` takes them.
    """
