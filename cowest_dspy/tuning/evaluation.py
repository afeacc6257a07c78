"""Evaluation inside a training: rows held out, their loss now and then, an early stop, and the best
adapter.

    tuned = train_dpo(DPO(held_out=0.2, patience=3), pairs.rows(),
    base="models/SmolLM2-135M-Instruct", output=Path("adapters/r1"))
    tuned.history[0]      # {"step": 0, "epoch": 0.0, "eval_loss": 0.6931, "eval_rewards/margins":
                          0.0, ..., "eval_kl": 0.0}
    tuned.best_step       # 12

Evaluating changes no weight, no gradient and no random number: the steps are bit for bit those of a
training on the kept rows.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cowest_dspy.errors import TuningError
from cowest_dspy.tuning import trainers, unpaired

MARGINS, ACCURACIES = "rewards/margins", "rewards/accuracies"


@dataclass(frozen=True)
class Split:
    """Indices of rows, ascending: ``kept`` to be trained on, ``held`` to be evaluated on. Together
    they are all rows."""

    kept: tuple[int, ...]
    held: tuple[int, ...]


def split(
    rows: Sequence[Mapping[str, Any]], part: float, seed: int, examples: Sequence[Any] | None = None
) -> Split:
    """Holds out about ``part`` of the rows, in [0, 0.5]; rows of one example or of one prompt are
    on the same side.

    ``examples`` are the rows' example ids, None where a row has none. Groups are held out in an
    order that ``seed`` gives, each if not more than ``part`` is held out with it; where every group
    is larger than that, the smallest one is.

    Raises:
        TuningError: all rows are of one example or prompt, so that none can be held out.

    >>> split([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c"}], 0.5, seed=0)
    Split(kept=(1, 3), held=(0, 2))
    """
    if not part:
        return Split(tuple(range(len(rows))), ())
    groups = _groups(rows, examples or [None] * len(rows))
    if len(groups) < 2:
        raise TuningError(
            f"held_out is {part}, but the {len(rows)} rows are all of one example or prompt, and "
            "what is trained on must not be "
            "evaluated on. Give rows of several prompts, or set held_out = 0."
        )
    wanted = max(1, round(part * len(rows)))
    held: list[int] = []
    for group in random.Random(f"held out {seed}").sample(groups, len(groups)):
        if len(held) + len(group) <= wanted:
            held += group
    held = held or min(groups, key=len)
    return Split(tuple(sorted({*range(len(rows))} - {*held})), tuple(sorted(held)))


def _groups(rows: Sequence[Mapping[str, Any]], examples: Sequence[Any]) -> list[list[int]]:
    """Rows that share an example id or a prompt, directly or by way of others, in order of their
    first row."""
    leader = list(range(len(rows)))

    def first(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    seen: dict[tuple[str, str], int] = {}
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        keys = [("prompt", json.dumps(row["prompt"], sort_keys=True))]
        keys += [("example", str(example))] if example is not None else []
        for key in keys:
            one, other = sorted((first(seen.setdefault(key, index)), first(index)))
            leader[other] = one
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(first(index), []).append(index)
    return list(groups.values())


def example_ids(rows: Iterable[Any]) -> list[Any]:
    """The ``example_id`` of each row, None where it has none."""
    return [row.get("example_id") if isinstance(row, Mapping) else None for row in rows]


class Evaluation:
    """Evaluates a training on its held-out rows, before the first step, every so many steps, and
    after the last.

    Each evaluation adds a record to ``history`` and goes to whatever the trainer reports to:

    eval_loss: of SFT the mean of -log p per completion token; of DPO the mean of the trainer's own
        loss per pair, of KTO per row, with the KL term of the held-out rows. Lower is better.
    eval_rewards/margins: of DPO and KTO, the difference of the mean rewards of both sides; a reward
    is beta times the log-ratio to
        the reference. eval_rewards/accuracies: of DPO, the share of pairs whose chosen side has the
        higher reward.
    eval_kl: the mean over all completion tokens of the held-out rows (of pairs, chosen and
        rejected) of log p - log p_ref, in nats. The reference is the model as training began. The
        completions are the data's, not samples of the model, so this is a mean log-ratio that
        stands in for the Kullback-Leibler divergence: it may be negative, and it is when the data's
        completions have become less likely. How far it is from 0 tells how far the model has moved
        on the data.

    ``best_step`` is the step, after the first, of the lowest eval_loss (the earliest of equals).
    The start is no candidate: it is what a training is measured against. Batches are of
    ``micro_batch_size`` rows; losses that compare the rows of a batch ("aot", "aot_unpaired")
    depend on that as they do in training.
    """

    def __init__(
        self,
        trainer: Any,
        settings: Any,
        held: Sequence[int],
        history: list[dict[str, float]],
        per_epoch: float,
    ) -> None:
        sizes = trainers.lengths(trainer)
        order = sorted(held, key=lambda index: -sizes[index])
        labelled = "label" in trainer.train_dataset.column_names
        data = (
            unpaired.prepared(trainer, order, len(order))
            if labelled
            else trainer.train_dataset.select(order)
        )
        self._batches = [
            _Batch(
                trainer.data_collator(
                    [
                        data[place]
                        for place in range(
                            start, min(start + settings.per_device_train_batch_size, len(order))
                        )
                    ]
                )
            )
            for start in range(0, len(order), settings.per_device_train_batch_size)
        ]
        self._trainer, self._settings, self._history, self._per_epoch = (
            trainer,
            settings,
            history,
            per_epoch,
        )
        self._start: float | None = None
        self._since_best, self._last = 0, 0
        self._best_loss, self._best_weights = math.inf, {}
        self.best_step: int | None = None
        self.stopped_early = False

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that evaluates when it is time, and stops the training
        when patience is over."""
        from transformers import TrainerCallback

        evaluation, settings = self, self._settings

        class Evaluating(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                evaluation.add_reference()
                if state.global_step == 0:  # A training that goes on was evaluated where it stands.
                    evaluation.evaluate(0)

            def on_log(
                self,
                args: Any,
                state: Any,
                control: Any,
                logs: dict[str, Any] | None = None,
                **_: Any,
            ) -> None:
                step, total = state.global_step, state.max_steps
                every = (
                    int(settings.eval_steps)
                    if settings.eval_steps >= 1
                    else max(1, int(settings.eval_steps * total))
                )
                if not logs or "loss" not in logs or (step % every and step != total):
                    return
                evaluation.evaluate(step)
                if evaluation.out_of_patience and step < total:
                    evaluation.stopped_early = control.should_training_stop = True

        return Evaluating()

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations in a row as ``patience`` allows were no better than the best
        before them."""
        return (
            self._settings.early_stopping_patience is not None
            and self._since_best >= self._settings.early_stopping_patience
        )

    def add_reference(self) -> None:
        """Adds the reference's log-probabilities to the batches of pairs, once and before any
        step."""
        trainer = self._trainer
        for batch in self._batches if "chosen_ids" in trainer.train_dataset.column_names else ():
            sides = trainer.compute_ref_log_probs(
                trainer.model, trainer._prepare_inputs(dict(batch.inputs))
            )
            batch.inputs["ref_chosen_logps"], batch.inputs["ref_rejected_logps"] = (
                side.cpu() for side in sides
            )

    def evaluate(self, step: int) -> None:
        """Measures, records and logs; notes whether this is the best so far, and keeps its adapter.

        Raises:
            TuningError: the held-out loss is no finite number.
        """
        trainer, model = self._trainer, self._trainer.model
        training = model.training
        model.eval()
        try:
            with trainers.own_random_state():
                measured = self._measure()
            if not math.isfinite(measured["eval_loss"]):
                raise TuningError(
                    f"Training diverged: at step {step} the loss of the held-out rows is "
                    f"{measured['eval_loss']}. "
                    'Lower learning_rate, raise warmup, or set precision = "fp32".'
                )
            self._history.append({"step": step, "epoch": step / self._per_epoch, **measured})
            trainer.log(dict(measured))
        finally:
            model.train(training)
        self._last = step
        if step:
            self._note(step, measured["eval_loss"])

    def kept(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What has been found so far, for a checkpoint: the weights of the best adapter, and
        JSON-able numbers."""
        best = self._best_loss if self.best_step else None
        found = {
            "start": self._start,
            "since_best": self._since_best,
            "last": self._last,
            "best": best,
            "best_step": self.best_step,
        }
        return dict(self._best_weights), found

    def go_on(self, weights: dict[str, Any], found: Mapping[str, Any]) -> None:
        """Takes over what :meth:`kept` gave in an earlier process."""
        self._best_weights, self._start = weights, found["start"]
        self._since_best, self._last, self.best_step = (
            found["since_best"],
            found["last"],
            found["best_step"],
        )
        self._best_loss = math.inf if found["best"] is None else found["best"]

    def finish(self) -> None:
        """Puts the best adapter back into the model, when it is wanted and not the last."""
        import torch

        if self._best_weights and self.best_step != self._last:
            with torch.no_grad():
                for name, parameter in self._trainer.model.named_parameters():
                    if name in self._best_weights:
                        parameter.copy_(self._best_weights[name])
        self._best_weights = {}

    def _note(self, step: int, loss: float) -> None:
        self._since_best += 1
        if loss < self._best_loss:
            self._best_loss, self.best_step, self._since_best = loss, step, 0
            if self._settings.load_best_model_at_end:
                parameters = self._trainer.model.named_parameters()
                self._best_weights = {
                    name: p.detach().to("cpu", copy=True)
                    for name, p in parameters
                    if p.requires_grad
                }

    def _measure(self) -> dict[str, float]:
        """The numbers of one evaluation; what TRL logs of a batch is a mean over its pairs, or its
        rows of one label."""
        trainer, sums = self._trainer, _Sums()
        loss = weight = 0.0
        inputs = [dict(batch.inputs) for batch in self._batches]
        if self._batches[0].kind == "unpaired":
            trainer.estimate(inputs)
        for batch, given in zip(self._batches, inputs, strict=True):
            value, _, _ = trainer.prediction_step(trainer.model, given, prediction_loss_only=True)
            share = batch.tokens if batch.kind == "sft" else batch.rows
            loss, weight = loss + float(value) * share, weight + share
            sums.add(batch, trainer._metrics["eval"])
            trainer._metrics["eval"].clear()
        loss /= weight
        # Of SFT the loss is the mean of -log p, and the reference's was measured before the first
        # step.
        self._start = loss if self._start is None else self._start
        kl = self._start - loss if self._batches[0].kind == "sft" else sums.log_ratio()
        return {"eval_loss": loss, **sums.means(), "eval_kl": kl}


class _Sums:
    """Sums over batches of what TRL logs as means: of rewards and of log-probabilities, for each
    side."""

    def __init__(self) -> None:
        self._rows = {"chosen": 0, "rejected": 0}
        self._rewards = {"chosen": 0.0, "rejected": 0.0}
        self._right: float | None = None
        self._ratio = self._tokens = 0.0

    def add(self, batch: _Batch, logged: Mapping[str, Sequence[float]]) -> None:
        """Adds a batch and what was logged of it."""
        self._tokens += batch.tokens
        if batch.kind == "sft":
            return
        for side, rows in batch.sides.items():
            if rows:
                self._rows[side] += rows
                self._rewards[side] += rows * logged[f"rewards/{side}"][-1]
                self._ratio += rows * logged[f"logps/{side}"][-1]
        self._ratio -= batch.reference
        if batch.kind == "pairs":
            self._right = (self._right or 0.0) + batch.rows * logged[ACCURACIES][-1]

    def log_ratio(self) -> float:
        """The mean over all completion tokens of log p - log p_ref."""
        return self._ratio / self._tokens

    def means(self) -> dict[str, float]:
        """The difference of the mean rewards of the sides, where both occur, and the accuracy of
        pairs."""
        made: dict[str, float] = {}
        if all(self._rows.values()):
            chosen, rejected = (
                self._rewards[side] / self._rows[side] for side in ("chosen", "rejected")
            )
            made[f"eval_{MARGINS}"] = chosen - rejected
        if self._right is not None:
            made[f"eval_{ACCURACIES}"] = self._right / self._rows["chosen"]
        return made


class _Batch:
    """Held-out rows as the trainer's collator makes them; how many they are, of each side, and
    their completions' tokens."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = dict(inputs)
        masked = "completion_mask" in inputs
        self.kind = "unpaired" if "label" in inputs else "pairs" if masked else "sft"
        rows = int(inputs["input_ids"].shape[0])
        desirable = int(inputs["label"].sum()) if self.kind == "unpaired" else 0
        self.rows = rows // 2 if self.kind == "pairs" else rows
        self.sides = (
            {"chosen": desirable, "rejected": rows - desirable}
            if self.kind == "unpaired"
            else {"chosen": self.rows, "rejected": self.rows}
        )
        counted = inputs["completion_mask"] if masked else inputs["labels"] != -100
        self.tokens = int(counted[:, 1:].sum())

    @property
    def reference(self) -> float:
        """The sum of the reference's log-probabilities of all completions."""
        names = (
            ("ref_logps",)
            if self.kind == "unpaired"
            else ("ref_chosen_logps", "ref_rejected_logps")
        )
        return float(sum(self.inputs[name].sum() for name in names))


def log_kl(trainer: Any, order: Sequence[int], settings: Any) -> None:
    """Adds "kl" to the logs of each step on pairs: what eval_kl is, of the step's own batch before
    the step.

    ``order`` are the trainer's rows as they are trained on. TRL logs a batch's mean rewards, which
    are beta times the log-ratios to the reference, so that nothing is computed for it. Without
    pairs nothing is added: there the step's loss says as much.
    """
    from transformers import TrainerCallback

    data, size = trainer.train_dataset, settings.step_rows
    if "chosen_ids" not in data.column_names:
        return
    tokens = [
        len(chosen) + len(rejected)
        for chosen, rejected in zip(data["chosen_ids"], data["rejected_ids"], strict=True)
    ]

    class Ratios(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if logs and {"loss", "rewards/chosen", "rewards/rejected"} <= logs.keys():
                batch = order[(state.global_step - 1) * size : state.global_step * size]
                rewards = logs["rewards/chosen"] + logs["rewards/rejected"]
                logs["kl"] = (
                    len(batch) * rewards / settings.beta / sum(tokens[index] for index in batch)
                )

    # First, so that all others see it.
    trainer.callback_handler.callbacks.insert(0, Ratios())
