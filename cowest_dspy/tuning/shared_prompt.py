"""The prompt of a pair computed once: chosen and rejected as one row, and the weights of bfloat16
rounded once.

TRL feeds a pair as two rows, ``prompt + chosen`` and ``prompt + rejected``. What a causal model
computes at a token depends on the tokens before it only, so wherever the two rows begin alike they
give the same numbers twice. Here the pair goes through the model's backbone as one row

    prompt | chosen | rejected          positions of rejected go on after the prompt; rejected does
        not see chosen

and what comes out is laid out again as TRL's two rows. The LM head, every loss and every metric
stay TRL's. Forward and backward are those of fewer tokens, and the same within float rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cowest_dspy.compat import attention_name

log = logging.getLogger(__name__)

# nats by which the log-probability of a token may differ, in float32; rounding makes about 1e-5
TOLERANCE = 1e-3
_HARMLESS = {
    "use_cache",
    "return_dict",
}  # arguments of a backbone that do not change what it computes


class PackedPairs(NamedTuple):
    """Pairs as rows of [shared beginning | rest of first | rest of second], ``B`` pairs and ``S``
    tokens in the longest.

    input_ids, position_ids: (B, S). attention_mask: (B, 1, S, S), 0 where a query may look and the
    lowest float where not.
    places: (2B, T), where in its pair's row each token of the rows given is found; 0 for padding.
    """

    input_ids: Any
    position_ids: Any
    attention_mask: Any
    places: Any


def pack(input_ids: Any, attention_mask: Any) -> PackedPairs:
    """Packs ``(2B, T)`` rows padded on the right, of which row i and row B + i are a pair. Any two
    rows may be one."""
    import torch

    width, device = input_ids.size(1), input_ids.device
    first, second = input_ids.chunk(2)
    real_first, real_second = attention_mask.bool().chunk(2)
    ends = real_first.sum(1, keepdim=True)
    shared = ((first == second) & real_first & real_second).long().cumprod(1).sum(1, keepdim=True)
    size = int((ends + real_second.sum(1, keepdim=True) - shared).max())
    counted = torch.arange(width, device=device).expand_as(first)
    # Column ``size`` takes the padding, and is cut off.
    to_first = torch.where(real_first, counted, size)
    to_second = torch.where(
        real_second, torch.where(counted < shared, counted, ends + counted - shared), size
    )

    def packed(of_first: Any, of_second: Any) -> Any:
        empty = input_ids.new_zeros((len(first), size + 1))
        return empty.scatter(1, to_first, of_first).scatter(1, to_second, of_second)[:, :size]

    steps = torch.arange(size, device=device)
    query, key = steps[None, :, None], steps[None, None, :]
    ends, shared = ends[:, :, None], shared[:, :, None]
    hidden = (key > query) | ((query >= ends) & (key >= shared) & (key < ends))
    mask = torch.zeros(hidden.shape, device=device).masked_fill(
        hidden, torch.finfo(torch.float32).min
    )[:, None]
    places = torch.cat([to_first, to_second])
    return PackedPairs(
        packed(first, second), packed(counted, counted), mask, places.masked_fill(places == size, 0)
    )


def share(backbone: Any) -> Callable[[], None]:
    """Makes ``backbone`` compute what two rows of a pair share only once; gives a function that
    undoes it.

    It takes and gives the same tensors as before, ``(2B, T)`` to ``(2B, T, H)``. Calls of another
    shape (an odd number of rows, a cache, padding on the left, router logits) go through as they
    are.
    """
    original = backbone.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if not _are_pairs(input_ids, attention_mask, others):
            return original(input_ids=input_ids, attention_mask=attention_mask, **others)
        pairs = pack(input_ids, attention_mask)
        found = original(
            input_ids=pairs.input_ids,
            position_ids=pairs.position_ids,
            attention_mask=pairs.attention_mask,
            use_cache=False,
        )
        states = found.last_hidden_state
        count, size, width = states.shape
        rows = pairs.places.new_tensor(range(count)).repeat(2)[:, None] * size + pairs.places
        found.last_hidden_state = (
            states.reshape(-1, width).index_select(0, rows.reshape(-1)).view(*rows.shape, width)
        )
        return found

    backbone.forward = forward

    def undo() -> None:
        del backbone.forward

    return undo


def share_if_equal(trainer: Any, sizes: Sequence[int]) -> bool:
    """Shares prompts in the model of a ``trl.DPOTrainer`` if its log-probabilities stay what they
    are; says if it does.

    Found out by computing the longest and the shortest pair both ways, before training: a sliding
    window shorter than the row, a recurrent layer, attention that takes no mask of its own make a
    difference, and such a model is left as it is. ``sizes`` are the tokens of every pair. A model
    that does not share is named in a line of the log.
    """
    model = (
        trainer.model.get_base_model()
        if hasattr(trainer.model, "get_base_model")
        else trainer.model
    )
    backbone, name = getattr(model, "base_model", model), type(model).__name__
    attention = attention_name(model.config.get_text_config())
    if backbone is model or attention not in ("eager", "sdpa"):
        log.info("%s computes the prompt of a pair twice: its attention is %s.", name, attention)
        return False
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    batch = collate(trainer, trainer.train_dataset, (by_size[-1], by_size[0]))
    expected = _log_probs(trainer.model, batch)
    undo = share(backbone)
    try:
        difference = (_log_probs(trainer.model, batch) - expected).abs().max().item()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        undo()
        log.info(
            "%s computes the prompt of a pair twice, since it takes no mask of its own: %s",
            name,
            error,
        )
        return False
    if not difference <= TOLERANCE:
        undo()
        log.info(
            "%s computes the prompt of a pair twice: computed once, log-probabilities differ by "
            "%.2g.",
            name,
            difference,
        )
        return False
    return True


def collate(trainer: Any, rows: Any, indices: Sequence[int]) -> dict[str, Any]:
    """A batch of these rows of the trainer's, on the device that it computes on."""
    batch = trainer.data_collator([rows[index] for index in indices])
    return {name: value.to(trainer.args.device) for name, value in batch.items()}


def round_frozen(model: Any) -> None:
    """Keeps the frozen linear layers of a LoRA model in bfloat16, for training under autocast to
    bfloat16.

    Autocast rounds the same float32 weights in every pass and keeps the rounded ones until the
    backward pass; so the numbers are the same bits, and the memory is less. Embeddings, norms, the
    LM head and the adapter stay float32. Not undone: the model is the training's own, thrown away
    after it, and its adapter saved; outside autocast it could not be computed with.
    """
    import torch

    base = model.get_base_model()
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(torch.bfloat16)


def _are_pairs(input_ids: Any, attention_mask: Any, others: dict[str, Any]) -> bool:
    if (
        input_ids is None
        or attention_mask is None
        or attention_mask.dim() != 2
        or len(input_ids) % 2
    ):
        return False
    if any(
        value is not None and value is not False
        for name, value in others.items()
        if name not in _HARMLESS
    ):
        return False
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _log_probs(model: Any, batch: dict[str, Any]) -> Any:
    """Log-probabilities of a collated batch of TRL's, (2B, T - 1), in the model's own precision and
    without gradients."""
    import torch

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                fused_lm_head=True,
            ).log_probs
    finally:
        model.train(training)
