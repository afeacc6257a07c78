"""A bundle: what a run ended with, in one folder that can be moved, checked, loaded and published.

    program.json    prompts and demos (no LM)         adapter/       the weak model's adapter,
                    safetensors
    recipe/         the task's Python files           config.toml    the configuration, no secrets,
                    no paths of a machine
    pairs.jsonl     preference pairs with lineage     metrics.json   arms with n and intervals,
                    influence, rounds
    README.md       the model card                    cowest.json    the manifest: versions, models,
                    a hash of every file
    router.json       where a draft pays, if the run has a router

manifest.py   what cowest.json says, verify_bundle, and open_bundle, the only way to what the files
              say
writing.py    write_bundle, from a finished run
card.py       the model card
loading.py    load_bundle, merged, as_gguf
"""

from cowest_dspy.experiment.bundle.loading import as_gguf, load_bundle, merged, recipe_of
from cowest_dspy.experiment.bundle.manifest import (
    Manifest,
    OpenBundle,
    open_bundle,
    read_manifest,
    verify_bundle,
)
from cowest_dspy.experiment.bundle.writing import push_bundle, write_bundle

__all__ = [
    "Manifest",
    "OpenBundle",
    "as_gguf",
    "load_bundle",
    "merged",
    "open_bundle",
    "push_bundle",
    "read_manifest",
    "recipe_of",
    "verify_bundle",
    "write_bundle",
]
