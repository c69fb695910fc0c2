"""The numbered blocks of a transformer, walked one at a time with all calibration batches side by side.

A *chain* is a run of blocks in which each reads what the one before wrote: the layers of a decoder, of an encoder. Its
inputs are caught once; from there on a `Stream` holds the hidden states of every batch at one depth and moves block by
block, so that no block but the current one need be on the device. What a block is given beside its hidden states
(masks, position embeddings, the encoder's output) is caught with them.

Where a model does something between two blocks (an encoder's end, a convolution, a stage of a pyramid) a new chain
begins, and its inputs are caught from the model as pruned so far. Nothing is assumed of the architecture otherwise.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Cache

from hf_sparse24.calibration.token_masks import TokenMasks, Told, listening, masks_of_stack

Batch = dict[str, Any]

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
_IGNORED = -100  # the label of padding, as losses in torch have it


class StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


class _Refused(ValueError):
    """What the walk itself refuses, told from what the model raises."""


class BlockCall(NamedTuple):
    """What a block is given beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """The hidden states of every batch at one depth of the model.

    Attributes:
        hidden (`list[Tensor]`): one a batch, (batch, tokens, features).
    """

    def __init__(self, hidden: list[Tensor], calls: list[dict[str, BlockCall]], masks: Sequence[TokenMasks]) -> None:
        self.hidden = hidden
        self._calls = calls
        self._masks = masks

    def copy(self) -> "Stream":
        """Return a stream that moves on its own from here."""
        return Stream(list(self.hidden), self._calls, self._masks)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.hidden)

    def call(self, block: nn.Module, name: str, index: int) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return what a block is called with for one batch, on the block's device: hidden states first."""
        call = self._calls[index][name]
        return send_to_device((self.hidden[index], call.args, call.kwargs), next(block.parameters()).device)

    def run(self, block: nn.Module, name: str, index: int) -> Tensor:
        """Run a block on one batch and return its hidden states, on the block's device."""
        hidden, args, kwargs = self.call(block, name, index)
        return hidden_of(block(hidden, *args, **kwargs))

    def outputs(self, block: nn.Module, name: str) -> list[Tensor]:
        """Return the block's hidden states for every batch, kept where those of the stream are."""
        return [self.run(block, name, index).to(hidden.device) for index, hidden in enumerate(self.hidden)]

    def kept_tokens(self, index: int, states: Tensor, handed: bool = False) -> Tensor | None:
        """Return which rows of a tensor in a block are real tokens, or None where that is not known.

        Args:
            index (`int`): the number of the batch.
            states (`Tensor`): (batch, tokens, ..., features) or (batch * tokens, features). With as many tokens as the
                hidden states it is taken for theirs, else for those of what the block is handed beside them.
            handed (`bool`): it is something that the block is handed.

        Returns:
            `Tensor`: bool, the shape of `states` without its last dimension, False for padding.
        """
        rows = states.shape[:-1]
        own = not handed and _has_rows_of(rows, self.hidden[index].shape[:2])
        mask = self._masks[index].own if own else self._masks[index].handed
        if mask is None or not _has_rows_of(rows, mask.shape):
            return None
        mask = mask.to(states.device)
        return mask.flatten() if len(rows) == 1 else mask.view(*mask.shape, *[1] * (len(rows) - 2)).expand(rows)


def _has_rows_of(rows: torch.Size, tokens: torch.Size) -> bool:
    """Tell whether rows are (batch, tokens), flattened, or with more than one to a token."""
    return rows[:2] == tokens or rows == (tokens.numel(),)


def block_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the numbered blocks that hold the targets, and their siblings, in the order of the modules.

    Raises:
        `ValueError`: a target is in no numbered block.
    """
    stacks = set()
    for target in targets:
        block = block_of(target)
        if block is None:
            raise ValueError(
                f"Calibrated methods walk the numbered layers of a model; {target} is in none. "
                f"Leave it out of target_modules, or use method='magnitude'."
            )
        stacks.add(block.rpartition(".")[0])
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if name.rpartition(".")[0] in stacks and name.rpartition(".")[2].isdecimal()]


def block_of(name: str) -> str | None:
    """Return the numbered block that a module is in.

    ```python
    >>> block_of("model.layers.3.mlp.experts.0.w1")
    'model.layers.3'

    ```
    """
    match = re.match(r"(?:(?:.*?)\.)?\d+(?=\.)", name)
    return match.group(0) if match else None


def find_chains(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[list[str]]:
    """Run one batch and return the blocks in the order of their calls, cut into chains.

    Raises:
        `ValueError`: a block is never called, or more than once.
    """
    chains: list[list[str]] = []
    written: Tensor | None = None

    def entered(name: str, hidden: Tensor, call: BlockCall) -> None:
        if any(name in chain for chain in chains):
            raise _Refused(
                f"{name} is called more than once in a forward pass: its weights are shared between layers, which no "
                "calibrated method here can walk. Use method='magnitude'."
            )
        follows = written is not None and hidden.shape == written.shape and torch.equal(hidden, written)
        chains[-1].append(name) if follows else chains.append([name])

    def left(name: str, output: Any) -> None:
        nonlocal written
        written = hidden_of(output).clone()  # what the model adds to it in place belongs to no block
        _check_finite(written, name, 0)

    try:
        with _hooked(model, names, entered, left):
            _forward(model, batch)
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot run the first calibration batch, which has {', '.join(batch)} "
            f"({type(error).__name__}: {error}). Give batches that model(**batch) takes."
        ) from error
    missing = [name for name in names if not any(name in chain for chain in chains)]
    if missing:
        raise ValueError(
            f"The calibration inputs do not reach {missing[0]} ({len(missing)} of {len(names)} layers). "
            "Give inputs that use the whole model, or keep those layers dense with modules_to_not_convert."
        )
    return chains


def record(
    model: nn.Module, batches: Sequence[Batch], chains: Sequence[list[str]], device: torch.device | None = None
) -> list[Stream]:
    """Run all batches and return a stream at the start of each of the chains.

    Args:
        model (`nn.Module`): as pruned so far.
        batches (`Sequence[dict]`): model inputs.
        chains (`Sequence[list[str]]`): some of the model's chains, in order.
        device (`torch.device`, *optional*): where each block runs in its turn, when the model lives elsewhere.

    Raises:
        `ValueError`: a batch does not reach a chain, or a block writes what is not finite.
    """
    first = {chain[0]: number for number, chain in enumerate(chains)}
    names = [name for chain in chains for name in chain]
    hidden: list[list[Tensor]] = [[] for _ in chains]
    masks: list[list[TokenMasks]] = [[] for _ in chains]
    calls: list[dict[str, BlockCall]] = []
    told: Told = {}

    def entered(name: str, states: Tensor, call: BlockCall) -> None:
        calls[-1][name] = call
        if name in first:
            hidden[first[name]].append(states)
            masks[first[name]].append(masks_of_stack(model, name, told))

    def left(name: str, output: Any) -> None:
        _check_finite(hidden_of(output), name, len(calls) - 1)
        if name == names[-1]:
            raise StopForward

    blocks = block_names(model, [f"{name}." for name in names])
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(_borrowing(model, blocks, device))
        stack.enter_context(listening(model, list(first), told))
        stack.enter_context(_hooked(model, names, entered, left))
        for batch in batches:
            calls.append({})
            told.clear()
            _forward(model, batch)
    for chain, states in zip(chains, hidden, strict=True):
        if len(states) != len(batches):
            raise ValueError(
                f"{len(batches) - len(states)} of {len(batches)} calibration batches do not reach {chain[0]}. "
                "Give batches that each use the whole model."
            )
    return [Stream(states, calls, tokens) for states, tokens in zip(hidden, masks, strict=True)]


def _check_finite(hidden: Tensor, name: str, number: int) -> None:
    if not hidden.isfinite().all():
        raise _Refused(
            f"The model's hidden states behind {name} hold NaN or Inf for calibration batch {number}, counted from 0 "
            "in each process. Check the data, or load the model in bfloat16 or float32."
        )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which may be a tuple that begins with them."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def borrowed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a copy of a block's tensors on a device; what is written to them there is forgotten."""
    tensors = [*block.parameters(), *block.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


@contextmanager
def _borrowing(model: nn.Module, names: Sequence[str], device: torch.device) -> Iterator[None]:
    """While active, each block runs on `device` and everything else where it lives."""
    handles, guests = [], ExitStack()

    def move_in(block: nn.Module, args: Any, kwargs: Any) -> Any:
        guests.enter_context(borrowed(block, device))
        return send_to_device((args, kwargs), device)

    def move_out(block: nn.Module, args: Any, output: Any) -> Any:
        guests.close()
        return send_to_device(output, next(block.parameters()).device)

    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(move_in, with_kwargs=True))
        handles.append(block.register_forward_hook(move_out))
    try:
        yield
    finally:
        guests.close()
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str], entered: Any, left: Any) -> Iterator[None]:
    handles = []
    for name in names:
        block = model.get_submodule(name)

        def before(block: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            entered(name, *_split_call(args, kwargs))

        def after(block: nn.Module, args: Any, output: Any, name: str = name) -> None:
            left(name, output)

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Separate the hidden states from the rest of a call, and leave out caches, which a second call would fill."""
    kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    if args:
        return args[0], BlockCall(tuple(None if isinstance(arg, Cache) else arg for arg in args[1:]), kwargs)
    key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs.pop(key), BlockCall((), kwargs)


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch on the model's own device and in its own dtype, without a cache and without labels."""
    parameter = next(model.parameters())
    inputs = {
        key: value.to(parameter.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in send_to_device(dict(batch), parameter.device).items()
    }
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes:
        inputs["use_cache"] = False
    reads_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if reads_labels and "labels" in inputs and not any(key in inputs for key in _DECODER_INPUTS):
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return inputs
        labels = inputs["labels"]
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if "decoder_attention_mask" in takes and "decoder_attention_mask" not in inputs:
            mask = torch.ones_like(labels)
            mask[:, 1:] = labels[:, :-1] != _IGNORED  # what is read comes one later than what is to be written
            inputs["decoder_attention_mask"] = mask
    inputs.pop("labels", None)
    return inputs


def _forward(model: nn.Module, batch: Batch) -> None:
    """Run the model on one batch as far as is needed."""
    try:
        model(**model_inputs(model, batch))
    except StopForward:
        return
