"""Options of TRL, PEFT and transformers that are not settings here: what replaced each, or why it
is not offered.

They are what a recipe for an older or the installed TRL says, so whoever writes one is told what to
write instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cowest_dspy.errors import nearest

_NEVER_CUT = (
    "rows are never cut; max_length, for prompt and completion together, makes a longer "
    "one an error"
)
_REFERENCE = "the reference is always the model as it is when training starts"
_WEIGHTS = "weights and the optimiser are float32; precision says what activations are computed in"
_LORA = (
    "the adapter's size is lora = Lora(rank=..., alpha=...), in a TOML lora = { rank = ..., "
    "alpha = ... }"
)
_FIXED = "it is set by the trainings themselves"
_KEPT = "nothing is written but the finished adapter, whose folder is given to the training"
_HELD_OUT = "here it is held_out, a share of the rows, and evaluate_every, patience, keep_best"

TRAINING: Mapping[str, str] = {
    # Removed from TRL.
    "max_prompt_length": _NEVER_CUT,
    "max_completion_length": _NEVER_CUT,
    "max_seq_length": f"TRL renamed it to max_length; {_NEVER_CUT}",
    "truncation_mode": _NEVER_CUT,
    "keep_end": _NEVER_CUT,
    "rpo_alpha": (
        'TRL removed it; write loss_type = ("sigmoid", "sft") and loss_weights = (1.0, alpha)'
    ),
    "reference_free": f"TRL removed it; {_REFERENCE}, and its part is small where beta is",
    "force_use_ref_model": _REFERENCE,
    "model_adapter_name": _REFERENCE,
    "ref_adapter_name": _REFERENCE,
    "ref_model": _REFERENCE,
    "label_pad_token_id": "TRL removed it; only completions carry loss",
    "padding_value": "TRL removed it; the tokenizer says what pads",
    "is_encoder_decoder": "TRL removed it; only decoders are tuned",
    "use_logits_to_keep": (
        "TRL removed it; only tokens that carry loss are projected onto the vocabulary, always"
    ),
    "use_liger_loss": (
        "TRL removed it; only tokens that carry loss are projected onto the vocabulary, always"
    ),
    "generate_during_eval": f"TRL removed it; {_HELD_OUT}",
    "evaluation_strategy": f"it is gone from transformers; {_HELD_OUT}",
    # Renamed here.
    "warmup_ratio": "transformers removed it; write warmup, a part of all steps such as 0.1",
    "warmup_steps": "write warmup, a part of all steps such as 0.1",
    "num_train_epochs": "write epochs",
    "num_epochs": "write epochs",
    "per_device_train_batch_size": (
        "write micro_batch_size for rows of one forward pass, batch_size for those of a step"
    ),
    "gradient_accumulation_steps": (
        "write batch_size for the rows of a step; accumulation is batch_size / micro_batch_size"
    ),
    "train_batch_size": "write batch_size",
    "lr": "write learning_rate",
    "lr_scheduler_type": 'write lr_scheduler: "linear", "cosine" or "constant"',
    "bf16": f'write precision = "bf16"; {_WEIGHTS}',
    "fp16": f'write precision = "bf16" or "fp32"; float16 is not offered; {_WEIGHTS}',
    "dtype": f"write precision; {_WEIGHTS}",
    "torch_dtype": f"write precision; {_WEIGHTS}",
    "load_in_4bit": f"quantised training is not offered; {_WEIGHTS}",
    "load_in_8bit": f"quantised training is not offered; {_WEIGHTS}",
    "quantization_config": f"quantised training is not offered; {_WEIGHTS}",
    "peft_config": _LORA,
    "use_peft": f"an adapter is always what is trained; {_LORA}",
    "lora_config": _LORA,
    "lora_r": _LORA,
    "lora_rank": _LORA,
    "lora_alpha": _LORA,
    "lora_dropout": f"{_LORA}; dropout is one of its keys",
    "lora_target_modules": f"{_LORA}; target_modules is one of its keys",
    "target_modules": "write it inside of lora: Lora(target_modules=...)",
    # Not offered: settled by the trainings, or in another place.
    "precompute_ref_log_probs": (
        "DPO always computes the reference once, before the first step; KTO in each pass"
    ),
    "precompute_ref_batch_size": "the reference is computed micro_batch_size rows at a time",
    "gradient_checkpointing": (
        "it is off; a smaller micro_batch_size needs less memory, and the gradient is the same"
    ),
    "activation_checkpointing": (
        "it is off; a smaller micro_batch_size needs less memory, and the gradient is the same"
    ),
    "activation_offloading": (
        "it is off; a smaller micro_batch_size needs less memory, and the gradient is the same"
    ),
    "sync_ref_model": f"{_REFERENCE}; further rounds start from a newer one: [rounds] count",
    "ref_model_mixup_alpha": f"{_REFERENCE}; further rounds start from a newer one: [rounds] count",
    "ref_model_sync_steps": f"{_REFERENCE}; further rounds start from a newer one: [rounds] count",
    "completion_only_loss": "only completions carry loss, always",
    "assistant_only_loss": (
        "only completions carry loss, always; of chat rows, the last message is the completion"
    ),
    "packing": "rows are not packed: each is trained on by itself, sorted by length inside a batch",
    "train_sampling_strategy": "rows are shuffled by the seed, and sorted by length inside a batch",
    "dataset_text_field": 'rows have "prompt" and "completion", or "messages"',
    "dataset_num_proc": _FIXED,
    "remove_unused_columns": "other columns of rows are ignored",
    "output_dir": _KEPT,
    "output": (
        "the folder is an argument of tune(), train_sft(), train_dpo() and train_kto(), not "
        "a setting"
    ),
    "save_strategy": _KEPT,
    "save_steps": _KEPT,
    "seed": "the seed is an argument of tune() and CoWest(), and a key of its own in a TOML",
    "data_seed": "the seed is an argument of tune() and CoWest(), and a key of its own in a TOML",
    "logging_steps": "every step is logged: on_step, and the history of the result",
    "eval_strategy": _HELD_OUT,
    "eval_steps": _HELD_OUT,
    "optim": "the optimiser is AdamW without weight decay",
    "weight_decay": "the optimiser is AdamW without weight decay",
    "max_grad_norm": "gradients are clipped to a norm of 1",
    "disable_dropout": "dropout is that of lora, 0 by default",
    "use_liger_kernel": _FIXED,
    "torch_compile": _FIXED,
    "use_cpu": "a GPU is used where there is one",
    "model": "the model is an argument of the training, not a setting",
    "model_init_kwargs": "the model is loaded from its folder in float32",
    "trust_remote_code": "code out of a model's folder is never run",
    "use_weighting": "WPO's weights of pairs are not offered",
    "f_divergence_type": "only the reverse Kullback-Leibler divergence is offered, as in the paper",
    "ld_alpha": (
        'length-desensitised DPO is not offered; loss_type = "sigmoid_norm" divides by the lengths'
    ),
    "simpo_gamma": 'SimPO is not offered; loss_type = "sigmoid_norm" divides by the lengths, too',
    "cpo_alpha": (
        'CPO is not offered; loss_type = ("sigmoid", "sft") adds the same likelihood of '
        "the chosen side"
    ),
}
"""By the name of the option: a clause that says what to write instead, or why nothing."""

LORA: Mapping[str, str] = {
    "r": "write rank",
    "lora_r": "write rank",
    "lora_alpha": "write alpha",
    "lora_dropout": "write dropout",
    "modules": "write target_modules",
    "layers": "write target_modules",
    "modules_to_save": "only LoRA's own matrices are trained and saved",
    "bias": "biases are not trained",
    "task_type": "only causal language models are tuned",
    "use_rslora": "write alpha = rank ** 0.5 times what it was for the same scale",
    "use_dora": "DoRA is not offered",
    "init_lora_weights": "an adapter starts as one that changes nothing",
}
"""The same for the keys of ``lora``."""

UNKNOWN = "unknown_keys"
"""The type of a validation error whose message already names the keys."""

# A loss that an experimental trainer of TRL has, and why it is refused.
EXPERIMENTAL = ("cpo", "simpo", "alphapo", "orpo")


def refusal(loss: str) -> str:
    """Why a loss of trl.experimental is not offered, and what is near to it."""
    near = (
        '"sigmoid_norm" (lengths are divided out)'
        if loss in ("simpo", "alphapo")
        else '("sigmoid", "sft")'
    )
    return (
        f'"{loss}" is not offered: TRL 1.16 has it only in trl.experimental, whose trainers cut '
        "long rows, add a second end token "
        "behind a chat template's, and have no frozen reference. The nearest here is loss_type = "
        f"{near}."
    )


def unknown_keys(
    given: Iterable[str],
    known: Iterable[str],
    others: Mapping[str, str],
    elsewhere: Mapping[str, str],
) -> list[str]:
    """One sentence for each key of ``given`` that is not ``known``: what replaced it, where it
    belongs, or the nearest known one.

    ``elsewhere`` gives for a key the settings that have it.

    >>> unknown_keys(["r", "rnak"], ["rank"], {"r": "write rank"}, {})
    ['r: there is no such key here: write rank.', 'rnak: there is no such key. Did you mean "rank"? Known: rank.']
    """
    known, told = list(known), []
    for key in given:
        if key in known:
            continue
        if key in others:
            told.append(f"{key}: there is no such key here: {others[key]}.")
        elif key in elsewhere:
            told.append(f"{key}: there is no such key here: it is one of {elsewhere[key]}.")
        else:
            told.append(
                f"{key}: there is no such key.{nearest(str(key), known)} Known: {', '.join(known)}."
            )
    return told
