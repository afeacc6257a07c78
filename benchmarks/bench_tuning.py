"""DPO on a processor: ours beside the script that a user of TRL writes, on the same pairs, model,
LoRA and settings.

    make bench                                     # 512 pairs of about 200 tokens, SmolLM2-135M
    python benchmarks/bench_tuning.py --pairs 64   # smaller

The stock script has TRL's defaults; only ``use_cpu`` is said to it, and what all share: one epoch,
8 pairs in a step, the learning rate, beta, LoRA with r = 16, the seed. "stock TRL, tuned by hand" is
the same script as somebody writes it who cares about speed: no gradient checkpointing, two pairs in
a forward pass, float32 where the processor does not compute in bfloat16, the reference computed
once. Each candidate runs in a
process of its own, which gives its peak of memory. Timed is everything from loading the model to
the saved adapter, imports aside: ours computes the reference before the first step, and that is
inside. "CPU s" counts all threads; with OMP_NUM_THREADS=1 it is what to compare on a busy machine.
"loss after" is measured afterwards and alike for all, in float32: the DPO loss of the saved adapter
on 64 of the pairs; before training it is ln 2 = 0.693. Every candidate shuffles in its own way, so
these agree about, not exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
BATCH, LEARNING_RATE, BETA, RANK, ALPHA, SEED = 8, 1e-4, 0.1, 16, 32, 0
SCORED = 64  # pairs on which the trained adapter is measured

Pairs = Sequence[dict[str, Any]]


def pairs(count: int) -> list[dict[str, Any]]:
    """Preference pairs: a prompt of about 120 tokens, completions of about 30 to 130, equal for
    equal counts.

    All are words of the project's own README in a random order. Those of a chosen completion are
    lower case, those of a rejected one are not, so there is something to learn.
    """
    words, rng = (ROOT / "README.md").read_text(encoding="utf-8").split(), random.Random(SEED)
    plain = [word for word in words if word.isalpha() and word.islower()]
    odd = [word for word in words if not word.isalpha()]

    def some(of: Sequence[str], low: int, high: int) -> str:
        return " ".join(rng.choices(of, k=rng.randint(low, high)))

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = []
    for _ in range(count):
        asked = [
            {"role": "system", "content": "You write notes."},
            {"role": "user", "content": f"Text: {some(plain, 60, 95)}"},
        ]
        # A plain word is one token or little more, another one about three.
        rows.append(
            {
                "prompt": asked,
                "chosen": answer(some(plain, 22, 100)),
                "rejected": answer(some(odd, 8, 36)),
            }
        )
    return rows


def ours(rows: Pairs, output: Path, **settings: Any) -> None:
    """This library's ``train_adapter``."""
    from cowest_dspy.tuning import DPO, Lora, train_adapter

    shared = {
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": BATCH // 2,
        "beta": BETA,
        "warmup_steps": 0,
    }
    lora = Lora(r=RANK, lora_alpha=ALPHA)
    train_adapter(
        DPO(**shared, lora=lora, **settings), rows, base=str(MODEL), output=output, seed=SEED
    )


def stock(rows: Pairs, output: Path, **settings: Any) -> None:
    """The script of TRL's documentation with LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    shared: dict[str, Any] = {
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = DPOConfig(output_dir=str(output.with_name("stock")), **{**shared, **settings})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=str(MODEL), args=args, train_dataset=Dataset.from_list(list(rows)), peft_config=lora
    )
    trainer.train()
    trainer.save_model(str(output))


def by_hand(rows: Pairs, output: Path) -> None:
    """The same script, tuned by hand."""
    from cowest_dspy.lms.local.weights import choose_dtype

    stock(
        rows,
        output,
        gradient_checkpointing=False,
        bf16=choose_dtype() == "bfloat16",
        precompute_ref_log_probs=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCH // 2,
        model_init_kwargs={"dtype": "float32"},
    )


CANDIDATES: dict[str, Callable[[Pairs, Path], None]] = {
    "train_adapter": ours,
    "stock TRL, tuned by hand": by_hand,
    "stock TRL script": stock,
}


def loss_after(rows: Pairs, adapter: Path) -> float:
    """The mean DPO loss of ``adapter`` on ``rows``: -ln sigmoid(beta * margin), by transformers and
    PEFT alone, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), adapter
    ).eval()

    def log_prob(prompt: list[Any], completion: list[Any]) -> torch.Tensor:
        start = len(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        )
        ids = torch.tensor([tokenizer.apply_chat_template(prompt + completion, return_dict=False)])
        scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return scores.gather(1, ids[0, start:, None]).sum()

    def margin(row: dict[str, Any]) -> torch.Tensor:
        return log_prob(row["prompt"], row["chosen"]) - log_prob(row["prompt"], row["rejected"])

    losses = []
    with torch.no_grad():
        for row in rows:
            with model.disable_adapter():
                reference = margin(row)
            losses.append(-torch.nn.functional.logsigmoid(BETA * (margin(row) - reference)).item())
    return sum(losses) / len(losses)


def measure(name: str, count: int) -> dict[str, float]:
    """Trains one candidate in this process: seconds, seconds of processor (all threads), peak GiB,
    loss after."""
    import peft  # noqa: F401  # imports are not timed
    import trl.trainer.dpo_trainer  # noqa: F401

    rows = pairs(count)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "adapter"
        started, worked = time.perf_counter(), time.process_time()
        CANDIDATES[name](rows, output)
        seconds, busy = time.perf_counter() - started, time.process_time() - worked
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "seconds": seconds,
            "busy": busy,
            "gib": gib,
            "loss": loss_after(rows[:SCORED], output),
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument(
        "--only",
        choices=tuple(CANDIDATES),
        action="append",
        help="measure these candidates (default: all)",
    )
    parser.add_argument(
        "--one",
        choices=tuple(CANDIDATES),
        help="measure this candidate in this process; the last line is JSON",
    )
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing: make models")
    if given.one:
        print(json.dumps(measure(given.one, given.pairs)))
        return
    found: dict[str, dict[str, float]] = {}
    for name in given.only or CANDIDATES:
        command = [sys.executable, __file__, "--one", name, "--pairs", str(given.pairs)]
        quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=quiet)
        if done.returncode:
            raise SystemExit(
                f"{name} ended with {done.returncode}; a negative number is a "
                f"signal.\n{done.stderr[-2000:]}"
            )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table(
        title=f"DPO of {MODEL.name}: {given.pairs} pairs, LoRA r={RANK}, {BATCH} pairs in a step, "
        "one epoch"
    )
    for column in ("", "pairs/s", "seconds", "CPU s", "times as fast", "peak GiB", "loss after"):
        table.add_column(column, justify="left" if not column else "right")
    slowest = max(one["seconds"] for one in found.values())
    for name, one in found.items():
        table.add_row(
            name,
            f"{given.pairs / one['seconds']:.2f}",
            f"{one['seconds']:.1f}",
            f"{one['busy']:.1f}",
            f"{found.get('stock TRL script', {'seconds': slowest})['seconds'] / one['seconds']:.2f}",
            f"{one['gib']:.2f}",
            f"{one['loss']:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
