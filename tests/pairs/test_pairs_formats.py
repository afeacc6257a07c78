"""Pairs as files and datasets: round trips, TRL's own trainers, pairs from elsewhere."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_traces import drafts_of, many

from cowest_dspy.errors import DataError, PairsError, TooFewPairs
from cowest_dspy.pairs import (
    PreferencePairs,
    UnpairedPreferences,
    preference_pairs,
    unpaired_preferences,
)

ASKED = [{"role": "user", "content": "How hot is the press?"}]
RIGHT = {"role": "assistant", "content": "180 degrees."}
WRONG = {"role": "assistant", "content": "4 bar."}
CONVERSATION = {"prompt": ASKED, "chosen": [RIGHT], "rejected": [WRONG]}
FORMATS = {
    "conversational": CONVERSATION,
    "standard": {"prompt": "How hot is the press?", "chosen": "180 degrees.", "rejected": "4 bar."},
    "implicit prompt": {"chosen": [*ASKED, RIGHT], "rejected": [*ASKED, WRONG]},
    "implicit prompt, repeated as a text": {
        "prompt": "How hot ...",
        "chosen": [*ASKED, RIGHT],
        "rejected": [*ASKED, WRONG],
    },
    "texts for messages": {"prompt": ASKED, "chosen": "180 degrees.", "rejected": [WRONG]},
    "other columns": {
        **CONVERSATION,
        "score": "high",
        "messages": None,
        "chosen": [{**RIGHT, "tool_calls": None}],
    },
}
OF_0_1_0 = {
    **CONVERSATION,
    **{
        "example_id": "train-016",
        "chosen_index": 1,
        "rejected_index": 3,
        "chosen_influence": 1.0,
        "rejected_influence": 0.0,
    },
    **{"weak_model": "local/weak@00dc+742c", "strong_model": "local/strong@d8a4-int8", "round": 1},
}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_pairs() -> PreferencePairs:
    return preference_pairs(
        many([[(1.0, "good"), (0.0, "bad")], [(0.5, "fine"), (-0.5, "poor\n\u2028odd")]]),
        run="toy, seed 0",
    )


# Line ends of every kind, and anything else that UTF-8 can hold.
texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\n\r\u2028\u2029\x85\x0b\x1c\x00"),
    ),
    min_size=1,
)


@settings(max_examples=50)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_pairs_and_labels_make_the_round_trip_through_files_and_datasets(
    drafts: list[tuple[str, str]],
) -> None:
    traces = many([[(1.0, f"1 {one}"), (-1.0, f"2 {other}")] for one, other in drafts])
    pairs, labels = (
        preference_pairs(traces, near=1.0, run="r"),
        unpaired_preferences(traces, run="r"),
    )
    assert len(pairs) == len(drafts) and len(labels) == 2 * len(drafts)
    with tempfile.TemporaryDirectory() as folder:
        assert PreferencePairs.load(pairs.save(Path(folder) / "pairs.jsonl")).items == pairs.items
        assert (
            UnpairedPreferences.load(labels.save(Path(folder) / "drafts.jsonl")).items
            == labels.items
        )
    assert PreferencePairs.from_dataset(pairs.to_dataset()).items == pairs.items
    assert labels.to_dataset().to_list() == labels.rows()


def test_pairs_are_a_sequence_whose_slices_are_pairs_too(tmp_path: Path) -> None:
    pairs = some_pairs()
    assert len(pairs) == 2 and pairs[0].chosen[0]["content"] == "good"
    assert [pair.example_id for pair in pairs] == ["e0", "e1"] and pairs[-1] is pairs.items[1]
    first = pairs[:1]
    assert isinstance(first, PreferencePairs) and first.items == pairs.items[:1]
    assert (first.dropped, first.rules) == (pairs.dropped, pairs.rules)
    assert PreferencePairs.load(first.save(str(tmp_path / "x.jsonl"))).items == first.items
    labels = unpaired_preferences(many([[(1.0, "good"), (-1.0, "bad")]]))
    assert isinstance(labels[1:], UnpairedPreferences) and labels[1:].helped == 0


def test_a_file_of_pairs_is_a_dataset(tmp_path: Path) -> None:
    from datasets import load_dataset

    file = some_pairs().save(str(tmp_path / "pairs.jsonl"))
    read: Any = load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read.to_list() == some_pairs().rows()
    assert PreferencePairs.from_dataset(read).items == some_pairs().items


def test_a_pair_says_where_it_comes_from() -> None:
    row = some_pairs().rows()[1]
    assert {key: row[key] for key in list(row)[3:]} == {
        "example_id": "e1", "chosen_index": 0, "rejected_index": 1, "chosen_influence": 0.5, "rejected_influence": -0.5,
        "weak_model": "local/weak@aa", "strong_model": "openai/strong", "round": 1,
        "chosen_score": 0.5, "rejected_score": 0.0, "alone_score": 0.0, "run": "toy, seed 0",
    }  # fmt: skip
    assert list(some_pairs().rows(lineage=False)[0]) == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_pairs_from_elsewhere_are_taken_in_each_of_trls_formats(
    row: dict[str, Any], tmp_path: Path
) -> None:
    from datasets import Dataset

    for made in (PreferencePairs.load(written(tmp_path, row)), PreferencePairs.from_dataset([row])):
        assert made.rows(lineage=False) == [CONVERSATION]
        pair = made[0]
        assert (pair.example_id, pair.weak_model, pair.chosen_influence, pair.alone_score) == (
            "row 1",
            "imported",
            None,
            None,
        )
    if not isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        assert PreferencePairs.from_dataset(Dataset.from_list([row])).rows(lineage=False) == [
            CONVERSATION
        ]


def test_the_implicit_prompt_is_the_one_that_trl_finds() -> None:
    from trl.data_utils import extract_prompt

    turns = [*ASKED, RIGHT, {"role": "user", "content": "And the mill?"}]
    row: dict[str, Any] = {"chosen": [*turns, RIGHT], "rejected": [*turns, WRONG]}
    assert PreferencePairs.from_dataset([row]).rows(lineage=False) == [extract_prompt(row)]


def test_a_file_of_an_earlier_version_is_still_read(tmp_path: Path) -> None:
    pair = PreferencePairs.load(written(tmp_path, OF_0_1_0))[0]
    row = PreferencePairs((pair,)).rows()[0]
    assert {key: row[key] for key in OF_0_1_0} == OF_0_1_0
    assert (pair.chosen_score, pair.rejected_score, pair.alone_score, pair.run) == (
        None,
        None,
        None,
        "",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": [RIGHT], "rejected": [WRONG]},
            'there is no "prompt", and chosen and rejected do not begin with the same',
        ),
        ({"chosen": "yes", "rejected": "no"}, 'there is no "prompt"'),
        (
            {"prompt": ASKED, "chosen": [RIGHT]},
            "this is no pair. rejected: Field required",
        ),
        ({**CONVERSATION, "prompt": []}, '"prompt" must be messages that say something'),
        ({**CONVERSATION, "prompt": "  "}, '"prompt" must be messages that say something'),
        (
            {**CONVERSATION, "chosen": [{"role": "assistant", "content": None}]},
            "chosen.0.content: Input should be a valid string",
        ),
        (
            {**CONVERSATION, "chosen": [{**RIGHT, "content": " "}]},
            '"chosen" must end in an assistant message that says something',
        ),
        ({**CONVERSATION, "rejected": ASKED}, '"rejected" must end in an assistant message'),
        ({**CONVERSATION, "rejected": [RIGHT]}, "chosen and rejected are the same text"),
        (
            {"chosen": [*ASKED, RIGHT], "rejected": [*ASKED, RIGHT]},
            "chosen and rejected are the same text",
        ),
        (
            {"chosen": [*ASKED, RIGHT], "rejected": [*ASKED, RIGHT, WRONG]},
            '"chosen" must end in an assistant',
        ),
        (
            {**CONVERSATION, "round": "first"},
            "round: Input should be a valid integer, unable to parse string as an integer. Each side",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    for make in (
        lambda: PreferencePairs.load(written(tmp_path, CONVERSATION, row)),
        lambda: PreferencePairs.from_dataset([OF_0_1_0, row]),
    ):
        with pytest.raises(PairsError, match="row 2") as caught:
            make()
        assert message in str(caught.value)


def test_what_holds_no_rows_at_all_is_said(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    with pytest.raises(PairsError, match=r"give one: dataset\['train'\]"):
        PreferencePairs.from_dataset(DatasetDict({"train": Dataset.from_list([CONVERSATION])}))
    with pytest.raises(PairsError, match="no rows"):
        PreferencePairs.from_dataset([])
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Grüße"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        PreferencePairs.load(tmp_path / "latin.jsonl")
    with pytest.raises(PairsError, match="row 1: this is no labelled draft"):
        UnpairedPreferences.load(written(tmp_path, CONVERSATION))


def one_step(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "max_length": None, "bf16": False,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip


def parts(tiny_model: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model),
        "processing_class": AutoTokenizer.from_pretrained(tiny_model),
    }


@pytest.mark.parametrize("imported", [False, True], ids=["of a run", "imported"])
def test_trls_dpo_trainer_takes_pairs_as_they_are(
    tiny_model: Path, tmp_path: Path, imported: bool
) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    pairs = (
        PreferencePairs.from_dataset([FORMATS["standard"], FORMATS["implicit prompt"]])
        if imported
        else some_pairs()
    )
    trainer = DPOTrainer(
        args=DPOConfig(**one_step(tmp_path)), train_dataset=pairs.to_dataset(), **parts(tiny_model)
    )
    trainer.train()
    read: Any = trainer.processing_class
    rows: Any = trainer.train_dataset
    for row, pair in zip(rows, pairs, strict=True):
        assert read.decode(row["chosen_ids"]).startswith(pair.chosen[0]["content"] + "<|im_end|>")
        assert read.decode(row["rejected_ids"]).startswith(
            pair.rejected[0]["content"] + "<|im_end|>"
        )
        assert pair.prompt[0]["content"] in read.decode(row["prompt_ids"])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_trls_kto_trainer_takes_labelled_drafts_as_they_are(
    tiny_model: Path, tmp_path: Path
) -> None:
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    drafts = unpaired_preferences(
        many([[(1.0, "good"), (-1.0, "bad")], [(0.5, "fine"), (0.0, "same"), (-0.5, "poor")]])
    )
    trainer = KTOTrainer(
        args=KTOConfig(**one_step(tmp_path)), train_dataset=drafts.to_dataset(), **parts(tiny_model)
    )
    trainer.train()
    read: Any = trainer.processing_class
    rows: Any = trainer.train_dataset
    labels = {
        read.decode(row["completion_ids"]).partition("<|im_end|>")[0]: row["label"] for row in rows
    }
    assert labels == {"good": True, "bad": False, "fine": True, "poor": False}


def test_nothing_to_train_on_says_what_to_try() -> None:
    pairs = preference_pairs(drafts_of((None, "a"), (1.0, "b")))
    with pytest.raises(
        PairsError,
        match=r"Only 0 preference pairs: 1 drafts that failed \(timeout\), 1 examples: only one "
        r"draft",
    ):
        pairs.to_dataset()
    with pytest.raises(PairsError, match="Sample more drafts"):
        pairs.push_to_hub("someone/pairs")


def shortage(dropped: dict[str, int]) -> str:
    with pytest.raises(TooFewPairs) as caught:
        PreferencePairs((), dropped).check_enough(1)
    return str(caught.value)


def test_the_advice_names_the_cause_of_the_lack_first() -> None:
    """Fifteen of twenty drafts were truncated, and the advice spoke of temperature."""
    truncated = {
        "drafts that failed (truncated)": 15,
        "examples: every draft failed": 4,
        "examples: only one draft": 1,
    }
    told = shortage(truncated)
    assert told.index("15 drafts failed (truncated): raise max_tokens") < told.index("temperature")
    alike = {"drafts that failed (timeout)": 1, "examples: all drafts had the same influence": 12}
    told = shortage(alike)
    assert told.index("temperature") < told.index("1 draft failed (timeout): raise timeout")
    # A drafter that nearly always wrote the same: 33 of 40 examples had one text, and few failures.
    same = {
        "drafts equal to another": 109,
        "drafts that failed (refine parse)": 6,
        "examples: every draft failed": 1,
        "examples: only one draft": 33,
    }
    told = shortage(same)
    assert told.index("temperature") < told.index("6 drafts failed")
    remedies = {
        "parse": "adapter",
        "alone rate limit": "requests_per_minute",
        "judge server": "endpoint",
        "odd": "mend",
    }
    for kind, says in remedies.items():
        assert says in shortage({f"drafts that failed ({kind})": 2})
