"""Bundles: what a run ended with, moved elsewhere, answers as before; and whatever is changed in
one is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from bundled import bundle, finished, resealed, weak_of, whole  # noqa: F401 - fixtures
from command_line import cowest
from forked import child
from hub import TOKEN, Hub, running_hub
from toy_experiment import RECIPE
from typer.testing import CliRunner

from cowest_dspy import Collaboration, Experiment, load_bundle, load_config
from cowest_dspy.cli import main
from cowest_dspy.errors import BundleError, ModelError, TuningError
from cowest_dspy.experiment import bundle as bundles
from cowest_dspy.experiment.bundle import (
    convert_to_gguf,
    merge_adapter,
    read_manifest,
    verify_bundle,
    write_bundle,
)
from cowest_dspy.experiment.bundle_card import format_card
from cowest_dspy.experiment.summary import read_run
from cowest_dspy.lms import LocalEngine
from cowest_dspy.lms.local import weights
from cowest_dspy.optimizers.router import Head, Router
from cowest_dspy.pairs import PreferencePairs
from cowest_dspy.store.record import unrecorded


def test_a_bundle_answers_as_its_run_did(finished: Path, bundle: Path, tiny_model: Path) -> None:
    questions = [f"another {number}?" for number in range(6)]
    with Experiment(
        load_config([finished / "run" / "config.toml"]), finished / "run"
    ) as experiment:
        program, strong = experiment.final, unrecorded(experiment.strong)
        before = [program(question=question).toDict() for question in questions]
    loaded = load_bundle(bundle, weak=weak_of(tiny_model), strong=strong, trust_recipe=True)
    assert [loaded(question=question).toDict() for question in questions] == before
    assert loaded.weak.model.rpartition("+")[2] == program.weak.model.rpartition("+")[2]
    built = load_bundle(
        bundle, weak=weak_of(tiny_model), strong=strong, program=Collaboration("question -> answer")
    )
    assert built.dump_state() == loaded.dump_state() == program.dump_state()
    assert verify_bundle(bundle) == (), "loading writes nothing into it"


def test_what_is_in_it(whole: Path, finished: Path) -> None:
    manifest, metrics = read_manifest(whole), json.loads((whole / "metrics.json").read_text())
    assert {
        "program.json",
        "config.toml",
        "metrics.json",
        "pairs.jsonl",
        "README.md",
        "recipe/toy.py",
    } <= set(manifest.files)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(manifest.files)
    assert len(PreferencePairs.load(whole / "pairs.jsonl")) == metrics["pairs"]["kept"] >= 2
    assert {line["name"] for line in metrics["arms"]} >= {"strong", "collaboration"} and metrics[
        "steps"
    ]
    card = (whole / "README.md").read_text()
    assert "| arm | n | failed |" in card and str(manifest.adapter) in card
    config = load_config([whole / "config.toml"])
    assert config.program == f"{(whole / 'recipe' / 'toy.py').resolve()}:program"
    for path in whole.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(finished).encode() not in content and b"/tmp/" not in content, path
            assert not re.search(rb"\.bin|pickle", path.name.encode())


def test_its_card_says_to_the_hub_what_it_is_and_what_was_measured(
    whole: Path, finished: Path
) -> None:
    from huggingface_hub import ModelCard

    data: Any = ModelCard.load(whole / "README.md").data
    manifest, metrics = read_manifest(whole), json.loads((whole / "metrics.json").read_text())
    known = {
        "license": "unknown",
        "base_model": manifest.base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
    }
    assert {name: data.get(name) for name in known} == known
    assert manifest.base == "tiny" and data.get("datasets") is None and "lora" in data.tags
    arms = {arm["title"]: arm for arm in metrics["arms"] if arm["score"] is not None}
    measured = {one.metric_name: one for one in data.eval_results}
    assert data.model_name == "toy" and {*arms} < {*measured}
    for title, arm in arms.items():
        one = measured[title]
        assert one.metric_value == round(arm["score"], 4) and one.metric_args["n"] == arm["n"]
        assert (one.metric_type, one.dataset_type, one.dataset_split) == ("match", "toy", "test")
    (influence,) = [one for one in data.eval_results if one.metric_type == "influence"]
    assert influence.metric_value == round(metrics["influence"]["1"]["mean"], 4)


def test_the_licence_is_given_or_the_bases_and_a_dataset_of_the_hub_is_named(
    whole: Path, finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    config = load_config(
        [finished / "run" / "config.toml"], overrides={"data.source": "hub:owner/rows:en"}
    )
    report, manifest = read_run(finished / "run"), read_manifest(whole)
    snapshot = tmp_path / "models--owner--tiny-model" / "snapshots" / "0123abc"
    shutil.copytree(tiny_model, snapshot)

    def card(base: Path, **about: Any) -> Any:
        about = {"base": weights.base_name(base), **about}
        made = manifest.model_copy(update=about).model_dump()
        return ModelCard(format_card(made, report, config, base, about.get("licence")))

    assert card(tiny_model, licence="mit").data.license == "mit"
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\n---\nTiny.")
    made = card(snapshot)
    assert (made.data.license, made.data.license_name) == ("other", "tiny")
    assert made.data.datasets == ["owner/rows"]
    assert {one.dataset_type for one in made.data.eval_results} == {"owner/rows"}
    assert made.data.base_model == "owner/tiny-model" and "no id on the Hub" not in made.text
    assert "no id on the Hub" in card(tiny_model).text
    (snapshot / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert card(snapshot).data.license == "unknown"
    assert "lora" not in card(tiny_model, adapter=None).data.tags


def test_peft_and_transformers_take_a_bundle_as_an_adapter(whole: Path, tiny_model: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((whole / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny", "its Hub id, or its name"
    ids = torch.arange(3, 40).unsqueeze(0)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, str(whole))(ids).logits
    assert not torch.equal(plain, tuned)
    with pytest.raises(OSError, match="huggingface"):  # The card says to give the folder.
        AutoPeftModelForCausalLM.from_pretrained(whole)


def test_a_router_is_taken_along(finished: Path, tmp_path: Path) -> None:
    head = Head(weights=(0.5,), intercept=0.0)
    router = Router(
        features=("draft_words",),
        heads={"strong": head, "collaborate": head},
        costs={"weak": 0.0, "strong": 0.9, "collaborate": 1.0},
    )
    file = router.save(finished / "run")
    try:
        with Experiment(
            load_config([finished / "run/config.toml"]), finished / "run"
        ) as experiment:
            made = write_bundle(experiment, tmp_path / "made")
    finally:
        file.unlink()
    assert (
        Router.load(made) == router
        and "router.json" in read_manifest(made).files
        and verify_bundle(made) == ()
    )


def test_every_change_is_noticed_and_named(bundle: Path, tiny_model: Path) -> None:
    assert cowest("verify", str(bundle)).count("is whole") == 1
    (bundle / "recipe" / "toy.py").write_text("import os")
    (bundle / "extra.txt").write_text("")
    (bundle / "metrics.json").unlink()
    assert set(verify_bundle(bundle)) == {
        "metrics.json: is missing",
        "recipe/toy.py: was changed",
        "extra.txt: does not belong to the bundle",
    }
    done = CliRunner().invoke(main.app, ["verify", str(bundle)])
    assert done.exit_code == 1 and "recipe/toy.py: was changed" in done.output
    with pytest.raises(BundleError, match="is not what was bundled"):
        load_bundle(bundle, weak=weak_of(tiny_model), strong=weak_of(tiny_model), trust_recipe=True)


def test_an_adapter_that_was_exchanged_with_its_hash_is_noticed(bundle: Path) -> None:
    manifest = json.loads((bundle / "cowest.json").read_text())
    (bundle / "cowest.json").write_text(json.dumps({**manifest, "adapter": "0" * 12}))
    assert "and the manifest says 000000000000" in verify_bundle(bundle)[0]


def test_the_recipe_is_given_the_draft_format_of_the_run(bundle: Path, tiny_model: Path) -> None:
    recipe, config = bundle / "recipe" / "toy.py", bundle / "config.toml"
    before = load_bundle(
        bundle,
        weak=weak_of(tiny_model),
        strong=weak_of(tiny_model),
        program=Collaboration("question -> answer"),
    )
    for old, new in (
        ("def program()", 'def program(draft="chain_of_thought")'),
        ('draft="knowledge")\n\ndef direct', "draft=draft)\n\ndef direct"),
    ):
        assert old in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(old, new))
    config.write_text('draft = "knowledge"\n' + config.read_text())
    loaded = load_bundle(
        resealed(bundle), weak=weak_of(tiny_model), strong=weak_of(tiny_model), trust_recipe=True
    )
    drafting: Any = loaded.draft
    assert list(drafting.signature.output_fields) == ["background"]
    assert loaded.dump_state() == before.dump_state()


@pytest.mark.parametrize(
    "forged",
    [
        {"config": {"api_base": "http://127.0.0.1:1"}},
        {"lm": {"model": "openai/other"}},
        {"_compiled": 1},
    ],
)
def test_a_forged_state_sets_nothing_but_prompts(
    bundle: Path, tiny_model: Path, forged: dict[str, Any]
) -> None:
    state = json.loads((bundle / "program.json").read_text())
    state["refine"].update(forged)
    (bundle / "program.json").write_text(json.dumps(state))
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match="more than prompts and demos"):
        load_bundle(resealed(bundle), weak=weak, strong=weak, trust_recipe=True)


def test_what_a_download_leaves_beside_it_is_no_damage(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "x.metadata").write_text("")
    assert verify_bundle(bundle) == ()
    (bundle / "cowest-0123456789ab.gguf").write_bytes(b"GGUF")
    assert verify_bundle(bundle) == ("cowest-0123456789ab.gguf: does not belong to the bundle",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 99}', "has format 99, and this cowest_dspy knows 2: update it"),
        ('{"format": 1}', "has format 1, .*: write the bundle again, by `cowest bundle RUN`"),
        ('{"format": 2}', "name: Field required"),
    ],
)
def test_a_manifest_that_cannot_be_read(bundle: Path, text: str, says: str) -> None:
    (bundle / "cowest.json").write_text(text)
    with pytest.raises(BundleError, match=says):
        verify_bundle(bundle)


def test_what_does_not_fit_is_refused(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match="trust_recipe=True to execute it"):
        load_bundle(bundle, weak=weak, strong=weak)
    with pytest.raises(BundleError, match="built otherwise"):
        load_bundle(
            bundle,
            weak=weak,
            strong=weak,
            program=Collaboration(draft=dspy.Predict("a -> facts"), refine=Nested()),
        )
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    with pytest.raises(BundleError, match="The bundle belongs to"):
        load_bundle(bundle, weak=weak_of(other), strong=weak, trust_recipe=True)
    tuned = load_bundle(bundle, weak=weak, strong=weak, trust_recipe=True).weak
    with pytest.raises(ModelError, match="has an adapter already"):
        load_bundle(bundle, weak=tuned, strong=weak, trust_recipe=True)
    with pytest.raises(TuningError, match="cannot be tuned here"):
        load_bundle(
            bundle, weak=dspy.LM("openai/x", api_key="none"), strong=weak, trust_recipe=True
        )
    with pytest.raises(BundleError, match=r"is no bundle: there is no cowest\.json"):
        verify_bundle(tmp_path)


class Nested(dspy.Module):
    """A refine of another structure."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dspy.Predict(dspy.make_signature("a, facts -> c", "Answer."))

    def forward(self, **inputs: Any) -> dspy.Prediction:
        return self.inner(**inputs)


def test_it_is_written_whole_over_a_bundle_and_over_nothing_else(
    finished: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with Experiment(
        load_config([finished / "run" / "config.toml"]), finished / "run"
    ) as experiment:
        with pytest.raises(BundleError, match="is no bundle"):
            write_bundle(experiment, tmp_path / "mine")
        calls = experiment.store.calls()
        write_bundle(experiment, bundle)
        assert experiment.store.calls() == calls, "nothing is asked"
    assert (
        verify_bundle(bundle) == ()
        and (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "mine"}


def test_law_10_no_bundle_with_a_secret_in_it_is_written(finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.py"
    recipe.write_text(RECIPE + '\nKEY = "sk-proj-' + 'abcdefghijkl1234"\n')
    config = load_config([finished / "run" / "config.toml"]).model_copy(
        update={"program": f"{recipe}:program"}
    )
    with pytest.raises(BundleError, match=r"toy\.py would hold what looks like a secret"):
        bundles._relocated(config, tmp_path / "recipe")
    with pytest.raises(BundleError, match=r"program\.json would hold"):
        bundles._write(
            tmp_path / "program.json",
            json.dumps({"demos": [{"answer": "hf_" + "abcdefghijklmnop1234"}]}),
        )
    assert not (tmp_path / "program.json").exists() and list((tmp_path / "recipe").iterdir()) == []


def test_a_run_that_is_not_finished_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    with Experiment(
        load_config([finished / "run" / "config.toml"]), tmp_path / "run"
    ) as experiment:
        with pytest.raises(BundleError, match="run `cowest cycle` on it first"):
            write_bundle(experiment, tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
    assert "is no run's folder" in cowest("bundle", str(tmp_path), fails=True)
    assert "--public says how --push uploads" in cowest(
        "bundle", str(tmp_path), "--public", fails=True
    )


def test_a_merged_model_says_what_base_and_adapter_say(
    bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = merge_adapter(bundle, tiny_model, tmp_path / "merged")
    whole: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    parts: Any = PeftModel.from_pretrained(base, bundle)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, parts(ids).logits, atol=1e-4)
        assert not torch.allclose(
            whole(ids).logits,
            AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits,
            atol=1e-2,
        )
    answer = LocalEngine(out).lm(temperature=0.0, max_tokens=8)("Question: 1?")
    assert answer and not list(out.glob("*.bin"))
    with pytest.raises(BundleError, match="exists: it is not overwritten"):
        merge_adapter(bundle, tiny_model, out)
    assert verify_bundle(bundle) == ()


def test_the_adapter_for_llama_cpp(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = convert_to_gguf(bundle, tiny_model, tmp_path / "out" / "adapter.gguf")
    assert file.read_bytes()[:4] == b"GGUF" and verify_bundle(bundle) == ()
    with pytest.raises(BundleError, match="exists: it is not overwritten"):
        convert_to_gguf(bundle, tiny_model, file)


def test_a_push_takes_a_private_model_and_a_refusal_says_why(bundle: Path) -> None:
    with running_hub() as hub:
        said = pushed(hub, bundle, "founders/drafter", TOKEN)
        assert "founders/drafter" in said and hub.datasets == {"founders/drafter": True}
        assert set(hub.files) == {*read_manifest(bundle).files, "cowest.json"}
        assert "BundleError: The Hub did not take founders/drafter" in pushed(
            hub, bundle, "founders/drafter", "wrong"
        )
    assert verify_bundle(bundle) == ()


def pushed(hub: Hub, bundle: Path, name: str, token: str) -> str:
    """What a process says that pushes the bundle: the Hub's address is read when its package is
    imported."""
    code = (
        "from cowest_dspy.experiment.bundle import push_bundle; "
        f"print(push_bundle({str(bundle)!r}, {name!r}))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    return done.stdout + done.stderr


def test_what_a_killed_process_left_goes_with_the_next_bundle(
    finished: Path, bundle: Path, tmp_path: Path
) -> None:
    ended = child(lambda: None)
    os.waitpid(ended, 0)
    for owner in (ended, os.getpid()):
        (tmp_path / f".bundle.{owner}.abc.tmp" / "bundle" / "recipe").mkdir(parents=True)
    (tmp_path / f".other.{ended}.abc.tmp").mkdir()
    with Experiment(
        load_config([finished / "run" / "config.toml"]), finished / "run"
    ) as experiment:
        write_bundle(experiment, bundle)
    assert {path.name for path in tmp_path.glob(".*")} == {
        f".bundle.{os.getpid()}.abc.tmp",
        f".other.{ended}.abc.tmp",
    }
    assert verify_bundle(bundle) == ()


def test_a_file_in_the_place_of_the_bundle_is_kept(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    with (
        Experiment(load_config([finished / "run" / "config.toml"]), finished / "run") as experiment,
        pytest.raises(BundleError, match="thesis is a file"),
    ):
        write_bundle(experiment, tmp_path / "thesis")
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_run_whose_adapter_is_damaged_says_so_before_it_asks(
    finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    for file in run.rglob("adapter_model.safetensors"):
        file.write_bytes(b"")
    files = (str(finished / "toy.toml"), str(finished / "backend.toml"))
    told = cowest("ask", *files, "--run", str(run), "-q", "another?", fails=True)
    assert re.search(
        r"^(TuningError|ModelError): .*adapter_model\.safetensors is damaged", told, re.MULTILINE
    )
