"""KTO's estimate of the KL divergence, taken over whole optimiser steps and against a reference
that is computed once.

KTO (Ethayarajh et al., 2024, arXiv 2402.01306, section 4.1) compares each completion with z0, the
KL divergence of the model from the reference. It estimates it from prompts x with completions y' of
other rows:

    z0 = max(0, mean of log pi(y'|x) - log ref(y'|x))

TRL takes that mean over a forward pass, so that how many rows fit into memory changes the result,
and a pass of one row is refused. Here it is taken over all rows of the optimiser step before the
first of them is trained on: the weights do not change inside a step, so one forward pass of 8 rows
and eight of one row give the same gradient, and the estimate is as steady as it can be.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any


def partners(prompts: Sequence[Hashable], batch_size: int) -> list[int]:
    """For each row in the order of training, the row of the same optimiser step whose completion
    its prompt is given.

    A step's completions are turned by so many places that the fewest meet their own prompt again,
    as those of several drafts of one question would; among equals by the smallest number. The last
    step may be shorter. A step of one row keeps its own.

    >>> partners(["a", "a", "b", "b"], 4)
    [2, 3, 0, 1]
    """
    made: list[int] = []
    for start in range(0, len(prompts), batch_size):
        step = prompts[start : start + batch_size]
        size = len(step)
        turns = range(1, size) or range(1)
        turn = min(
            turns,
            key=lambda by: sum(step[place] == step[(place + by) % size] for place in range(size)),
        )
        made += [start + (place + turn) % size for place in range(size)]
    return made


def kto_trainer_class() -> type[Any]:
    """``trl.KTOTrainer`` with z0 over whole optimiser steps. Its rows need the columns that
    :func:`prepare` adds."""
    from trl.trainer.kto_trainer import KTOTrainer

    class StepwiseKTOTrainer(KTOTrainer):
        def __init__(self, *arguments: Any, args: Any, **options: Any) -> None:
            # One row per forward pass is refused there because z0 would be the row's own reward. It
            # is not, here.
            rows, args.per_device_train_batch_size = (
                args.per_device_train_batch_size,
                max(2, args.per_device_train_batch_size),
            )
            super().__init__(*arguments, args=args, **options)
            args.per_device_train_batch_size = rows
            self._train_batch_size = args.train_batch_size
            self._z0: Any = None

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            """The micro-batches of the next optimiser step, with their common z0 computed."""
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.estimate(batches)
            return batches, items

        def estimate(self, batches: Sequence[dict[str, Any]]) -> None:
            """Computes the z0 of these batches, for the losses of exactly these, and notes in them
            that it is done."""
            import torch

            if not self.calculate_KL or not batches:
                return

            ratios: list[Any] = []
            with torch.no_grad(), self.compute_loss_context_manager():
                for batch in batches:
                    inputs = self._prepare_inputs(batch)
                    now: Any = super()._compute_kl_logps(self.model, inputs)
                    ratios.append(now - inputs["ref_KL_logps"])
                    # What the loss subtracts from _compute_kl_logps is subtracted already.
                    batch["ref_KL_logps"] = torch.zeros_like(batch["ref_KL_logps"])
            self._z0 = torch.cat(ratios).mean()

        def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
            if self._z0 is None:
                return super()._compute_kl_logps(model, batch)
            return self._z0.expand_as(batch["ref_KL_logps"])

    return StepwiseKTOTrainer


def prepare(trainer: Any, order: Sequence[int]) -> None:
    """Makes :func:`prepared` rows of the trainer's, in ``order``, its training rows; a step is what
    its arguments say."""
    step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    trainer.train_dataset, trainer.precompute_ref_logps = prepared(trainer, order, step), True


def prepared(trainer: Any, order: Sequence[int], step: int) -> Any:
    """The trainer's rows in ``order``, with each one's partner and the reference's
    log-probabilities of both.

    What occurs together several times is computed once. A partner's completion that would make its
    row longer than every real one is cut: it is a sample for a mean, not trained on.
    """
    data = trainer.train_dataset
    prompts, completions = list(data["prompt_ids"]), list(data["completion_ids"])
    most = max(
        len(prompt) + len(completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    )
    own = [(row, row) for row in order]
    others = partners([tuple(prompts[row]) for row in order], step) if trainer.calculate_KL else []
    mixed = [(row, order[other]) for row, other in zip(order, others, strict=False)]
    texts = {
        pair: (prompts[pair[0]], completions[pair[1]][: most - len(prompts[pair[0]])])
        for pair in own + mixed
    }
    found = _reference(trainer, texts)
    data = data.select(order).add_column("ref_logps", [found[pair] for pair in own])
    if trainer.calculate_KL:
        data = data.remove_columns("KL_completion_ids").add_column(
            "KL_completion_ids", [texts[pair][1] for pair in mixed]
        )
        data = data.add_column("ref_KL_logps", [found[pair] for pair in mixed])
    return data


def _reference(
    trainer: Any, pairs: dict[tuple[int, int], tuple[list[int], list[int]]]
) -> dict[tuple[int, int], float]:
    """The reference's log-probability of each completion after its prompt, longest first so that
    batches pad little."""
    names = sorted(pairs, key=lambda pair: (-sum(map(len, pairs[pair])), pair))
    size, found, wanted = max(2, trainer.args.per_device_train_batch_size), {}, trainer.calculate_KL
    trainer.model.eval()
    trainer.calculate_KL = (
        False  # Of this pass's rows nothing is mixed: each pair is a row of its own.
    )
    try:
        for start in range(0, len(names), size):
            chunk = names[start : start + size]
            rows = [
                {"prompt_ids": pairs[name][0], "completion_ids": pairs[name][1], "label": True}
                for name in chunk
            ]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            found.update(
                zip(
                    chunk,
                    trainer.compute_ref_log_probs(trainer.model, batch)[0].tolist(),
                    strict=True,
                )
            )
    finally:
        trainer.calculate_KL = wanted
    return found
