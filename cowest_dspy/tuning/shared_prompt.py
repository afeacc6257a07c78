"""What rows of a batch begin with, computed once: chosen and rejected as one row, rows of SFT with
one prompt as one row; and the weights of bfloat16 rounded once.

TRL feeds a pair as two rows, ``prompt + chosen`` and ``prompt + rejected``, and rows of SFT that
begin with the same instructions one by one. What a causal model computes at a token depends on the
tokens before it only, so wherever rows begin alike they give the same numbers several times. Here
they go through the model's backbone as one row

    beginning | rest of first | rest of second | ...

in which the positions of each rest go on after the beginning, and no rest sees another. What comes
out is laid out again as TRL's rows. The LM head, every loss and every metric stay TRL's. Forward
and backward are those of fewer tokens, and the same within float rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cowest_dspy.compat import attention_name

log = logging.getLogger(__name__)

# nats by which the log-probability of a token may differ, in float32; rounding makes about 1e-5
TOLERANCE = 1e-3
SHORT = 512
"""Tokens up to which a row may grow by packing, or to twice the longest row that is packed:
attention costs the square of them."""
_HARMLESS = {
    "use_cache",
    "return_dict",
}  # arguments of a backbone that do not change what it computes


class PackedRows(NamedTuple):
    """Rows packed n to one, as [shared beginning | rest of first | rest of second | ...]: ``B``
    rows of ``S`` tokens in the longest.

    input_ids, position_ids: (B, S). attention_mask: (B, 1, S, S), 0 where a query may look and the
    lowest float where not.
    places: (n * B, T), where in its packed row each token of the rows given is found; 0 for
    padding.
    """

    input_ids: Any
    position_ids: Any
    attention_mask: Any
    places: Any


def pack(input_ids: Any, attention_mask: Any, together: int = 2) -> PackedRows:
    """Pack ``(n * B, T)`` rows padded on the right, ``together`` = n to one: rows i, B + i, 2B + i,
    ... Any rows may be packed, also such as have no token in common."""
    import torch

    device, width = input_ids.device, input_ids.size(1)
    ids, real, shared = _beginnings(input_ids, attention_mask, together)
    shared = shared[None, :, None]
    counted = torch.arange(width, device=device).expand_as(ids)
    rest = (real.sum(2, keepdim=True) - shared).cumsum(0)
    starts = shared + torch.cat([torch.zeros_like(rest[:1]), rest[:-1]])  # of each rest
    size = int((shared + rest[-1:]).max())
    inside = counted >= shared
    # Column ``size`` takes the padding, and is cut off.
    places = torch.where(real, torch.where(inside, starts + counted - shared, counted), size)

    def packed(values: Any) -> Any:
        made = input_ids.new_zeros((ids.size(1), size + 1))
        for to, value in zip(places, values, strict=True):
            made.scatter_(1, to, value)
        return made[:, :size]

    begins = packed(torch.where(inside, starts, 0))[:, :, None]
    steps = torch.arange(size, device=device)
    query, key = steps[None, :, None], steps[None, None, :]
    hidden = (key > query) | ((key >= shared[0][:, :, None]) & (key < begins))
    mask = torch.zeros(hidden.shape, device=device).masked_fill(
        hidden, torch.finfo(torch.float32).min
    )[:, None]
    flat = places.reshape(-1, width)
    return PackedRows(packed(ids), packed(counted), mask, flat.masked_fill(flat == size, 0))


def choose_together(input_ids: Any, attention_mask: Any) -> int:
    """How many rows of a batch to pack to one: as many as make no packed row longer than SHORT
    tokens, or than twice the longest row; 1 where nothing is gained."""
    rows, width = input_ids.shape
    for together in range(rows, 1, -1):
        if rows % together:
            continue
        _, real, shared = _beginnings(input_ids, attention_mask, together)
        longest = int((real.sum(2).sum(0) - (together - 1) * shared).max())
        if int(shared.max()) and longest <= max(SHORT, 2 * width):
            return together
    return 1


def _beginnings(input_ids: Any, attention_mask: Any, together: int) -> tuple[Any, Any, Any]:
    """Rows that are packed to one beside each other: ids and whether they are real, both (n, B, T),
    and how many tokens all n begin with, (B,)."""
    shape = (together, -1, input_ids.size(1))
    ids, real = input_ids.view(shape), attention_mask.bool().view(shape)
    return ids, real, ((ids == ids[:1]) & real).all(0).long().cumprod(1).sum(1)


def share(backbone: Any, together: int | None = 2) -> Callable[[], None]:
    """Make ``backbone`` compute what rows of a batch share only once; gives a function that undoes
    it. ``together``: so many rows are packed to one; None: as many as it pays for.

    It takes and gives the same tensors as before, ``(n * B, T)`` to ``(n * B, T, H)``. Calls of
    another shape (a number of rows that is no multiple, a cache, padding on the left, router
    logits) go through as they are.
    """
    original = backbone.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        many = 1
        if _are_padded_rows(input_ids, attention_mask, others):
            many = together or choose_together(input_ids, attention_mask)
        if many == 1 or len(input_ids) % many:
            return original(input_ids=input_ids, attention_mask=attention_mask, **others)
        rows = pack(input_ids, attention_mask, many)
        found = original(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            use_cache=False,
        )
        states = found.last_hidden_state
        count, size, width = states.shape
        whose = rows.places.new_tensor(range(count)).repeat(many)[:, None] * size + rows.places
        found.last_hidden_state = (
            states.reshape(-1, width).index_select(0, whose.reshape(-1)).view(*whose.shape, width)
        )
        return found

    backbone.forward = forward

    def undo() -> None:
        del backbone.forward

    return undo


def share_if_equal(trainer: Any, sizes: Sequence[int]) -> bool:
    """Share what rows begin with in the model of a ``trl.DPOTrainer`` or ``trl.SFTTrainer`` if its
    log-probabilities stay what they are; says if it does.

    Found out by computing the longest and the shortest row both ways, before training: a sliding
    window shorter than the row, a recurrent layer, attention that takes no mask of its own make a
    difference, and such a model is left as it is. ``sizes`` are the tokens of every row. A model
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
        log.info("%s computes a prompt for each row: its attention is %s.", name, attention)
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
            "%s computes a prompt for each row, since it takes no mask of its own: %s", name, error
        )
        return False
    if not difference <= TOLERANCE:
        undo()
        log.info(
            "%s computes a prompt for each row: computed once, log-probabilities differ by %.2g.",
            name,
            difference,
        )
        return False
    if "labels" in batch:  # SFT: rows are in no order that pairs them.
        undo()
        share(backbone, together=None)
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


def _are_padded_rows(input_ids: Any, attention_mask: Any, others: dict[str, Any]) -> bool:
    if input_ids is None or attention_mask is None or attention_mask.dim() != 2:
        return False
    if any(
        value is not None and value is not False
        for name, value in others.items()
        if name not in _HARMLESS
    ):
        return False
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _log_probs(model: Any, batch: dict[str, Any]) -> Any:
    """Log-probabilities of a collated batch of TRL's, (rows, T - 1), in the model's own precision
    and without gradients."""
    import torch

    labels = batch.get("labels")
    if labels is None:
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
