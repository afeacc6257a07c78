"""Every error that cowest_dspy raises on purpose, one tree under one root.

    CowestError
    |-- ConfigError     a TOML file or a settings object says something that cannot be
    |-- RecipeError     a reference such as "programs/handbook.py:program" leads nowhere
    |-- DataError       rows, splits or fields that do not fit
    |-- ModelError      weights, tokenizers, adapters, engines
    |-- ProgramError    a program that is not bound, or whose signatures do not fit together
    |-- StoreError      the run folder: in use, damaged, or of another configuration
    |-- BudgetError     [budget] is used up: everything is kept, and a larger one goes on
    |-- ClusterError    the Ray cluster cannot be reached, or cannot collect a shard
    |-- CollectionError a collection that must not go on, for instance because too many calls fail
    |-- PairsError      no pairs, or a file that holds something else; TooFewPairs
    |-- TuningError     training that cannot start, or must not go on
    |-- ReportError     a report that cannot be read or written
    |-- RouterError       a router that cannot be fitted or read
    |-- BundleError     a bundle that cannot be written, was changed, or does not fit

A message says what was given, what was expected and what to type. Errors of DSPy, TRL and of Python
itself are not wrapped unless the wrapper can say more than they do; then the original is the
``__cause__``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cowest_dspy.utils.masking import MASK as MASK
from cowest_dspy.utils.masking import masked as masked

if TYPE_CHECKING:
    from pydantic import ValidationError


class CowestError(Exception):
    """The root. ``except CowestError`` catches everything that a user can mend."""


class ConfigError(CowestError):
    """A configuration that cannot be: an unknown key, a missing table, a value out of range."""


class RecipeError(CowestError):
    """A reference to Python code that does not lead to an object."""


class DataError(CowestError):
    """Rows, splits or fields that do not fit what the program needs."""


class ModelError(CowestError):
    """A model folder, GGUF file, tokenizer, chat template or adapter that cannot be used."""


class ProgramError(CowestError):
    """A program that is not bound to its LMs, or whose parts do not fit together."""


# All three arise inside of a model's call. DSPy makes a failure of the model of whatever an engine
# raises there, and a failure is counted and passed over; warnings that were made errors are the
# exception, which it lets through as they are.


class StoreError(CowestError, Warning):
    """A run folder that is in use, damaged, or belongs to another configuration."""


class BudgetError(CowestError, Warning):
    """A limit of [budget] is reached. It ends a collection or an evaluation; all that was answered
    is kept."""


class ClusterError(CowestError, Warning):
    """A Ray cluster that cannot be reached, or on which a shard cannot be collected."""


class CollectionError(CowestError):
    """A collection of traces that must not go on."""


class PairsError(CowestError):
    """Preference pairs that are missing, empty or malformed."""


class TooFewPairs(PairsError):
    """Fewer preference pairs (or labelled drafts) than are trained on. ``found`` of them there are;
    ``shortage`` says what lacks, such as "7 pairs, 8 needed"."""

    def __init__(self, message: str, found: int, shortage: str) -> None:
        super().__init__(message)
        self.found, self.shortage = found, shortage


class TuningError(CowestError):
    """Training that cannot start, or must not go on."""


class ReportError(CowestError):
    """A report that cannot be read or written."""


class RouterError(CowestError):
    """A router for which too little was observed, or whose file cannot be read."""


class BundleError(CowestError):
    """A bundle that cannot be written, was changed, or does not fit the models that it is given."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean "x"?`` for the known word that is nearest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def describe_faults(error: ValidationError, whole: str, *, most: int | None = 3) -> str:
    """The first things found wrong in a document (None: all), each as "where: what"; ``whole``
    stands for the document itself."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or whole}: {one['msg']}" for one in error.errors()[:most]
    )
