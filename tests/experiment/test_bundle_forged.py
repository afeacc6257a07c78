"""A bundle whose manifest was re-signed, a file that changes while it is read, a place that is
written to while others read: nothing runs but what the manifest names and its hashes cover, and a
reader sees one whole bundle."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundled import resealed, small_bundle, weak_of
from command_line import cowest
from forked import child
from toy import engine as engine_table
from toy_experiment import RECIPE
from typer.testing import CliRunner

from cowest_dspy import load_bundle, load_config
from cowest_dspy.cli import main, serving
from cowest_dspy.cli.verbs import read_config
from cowest_dspy.errors import BundleError
from cowest_dspy.experiment import bundle as bundles
from cowest_dspy.experiment.bundle import read_manifest, verify_bundle
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.utils import importing
from cowest_dspy.utils.files import replace_folder

OURS = 'open("{mark}", "w").close()\n'


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("small") / "bundle", tiny_model)


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A bundle, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that planted code makes."""
    return tmp_path / "planted-code-ran"


@pytest.mark.parametrize(
    "place", ["absolute", "above", ".cache", "__pycache__", "not in recipe/", "a module"]
)
def test_no_program_outside_the_manifest_is_executed(
    place: str, bundle: Path, tiny_model: Path, tmp_path: Path, mark: Path
) -> None:
    planted = {
        "absolute": tmp_path / "evil.py",
        "above": tmp_path / "evil.py",
        ".cache": bundle / ".cache/huggingface/evil.py",
        "__pycache__": bundle / "recipe/__pycache__/evil.py",
        "not in recipe/": bundle / "evil.py",
        "a module": tmp_path / "evil.py",
    }[place]
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(OURS.format(mark=mark) + "def program(): ...\n")
    named = {"above": "recipe/../../evil.py", "a module": "evil"}.get(place) or os.path.relpath(
        planted, bundle
    )
    resealed(bundle, program=f"{planted if place == 'absolute' else named}:program")
    weak = weak_of(tiny_model)
    with pytest.raises(
        BundleError,
        match=r"evil.* (no file of the bundle's recipe|does not belong|no bundle holds)",
    ):
        load_bundle(bundle, weak=weak, strong=weak, trust_recipe=True)
    assert not mark.exists()


def test_bytecode_beside_the_recipe_is_refused_and_never_executed(
    bundle: Path, tiny_model: Path, mark: Path
) -> None:
    recipe = bundle / "recipe" / "toy.py"
    evil = bundle.parent / "evil.py"
    source = recipe.read_text()
    evil.write_text(OURS.format(mark=mark) + source)
    recipe.write_text(source)
    os.utime(recipe, (1, 1))
    compiled = Path(
        py_compile.compile(str(evil), cfile=importlib.util.cache_from_source(str(recipe))) or ""
    )
    # The header of a .pyc: 16 bytes, of which the last 8 are the time and the size of its source.
    data = compiled.read_bytes()
    compiled.write_bytes(
        data[:8]
        + (1).to_bytes(4, "little")
        + recipe.stat().st_size.to_bytes(4, "little")
        + data[16:]
    )
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match=r"toy\.cpython-\d+\.pyc"):
        load_bundle(resealed(bundle), weak=weak, strong=weak, trust_recipe=True)
    shutil.rmtree(compiled.parent)
    load_bundle(resealed(bundle), weak=weak, strong=weak, trust_recipe=True)
    assert not mark.exists() and not compiled.parent.exists()


FOREIGN = [
    "../outside.py",
    "recipe/../../outside.py",
    "/outside.py",
    "recipe\\..\\x.py",
    "recipe/a/../b.py",
    "./program.json",
]


@pytest.mark.parametrize("name", [*FOREIGN, "x.pth", "recipe/\u202eyp.x.py", "recipe/\x9b2K.py"])
def test_a_manifest_names_only_files_that_a_bundle_has(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside.py").write_text("")
    manifest = json.loads((bundle / "cowest.json").read_text())
    (bundle / "cowest.json").write_text(
        json.dumps({**manifest, "files": {**manifest["files"], name: "0" * 64}})
    )
    with pytest.raises(BundleError, match=r"no bundle holds"):
        verify_bundle(bundle)


def test_a_manifest_that_names_a_file_twice_is_damaged(bundle: Path) -> None:
    text = (bundle / "cowest.json").read_text()
    (bundle / "cowest.json").write_text(
        text.replace('"files": {', '"files": {"recipe/toy.py": "' + "0" * 64 + '",')
    )
    with pytest.raises(
        BundleError, match=r"is damaged: the key \"recipe/toy\.py\" stands there twice"
    ):
        verify_bundle(bundle)


def test_a_deep_manifest_is_one_error(bundle: Path) -> None:
    (bundle / "cowest.json").write_text('{"files":' * 100_000)
    assert cowest("verify", str(bundle), fails=True).startswith("BundleError: ")
    (bundle / "cowest.json").write_bytes(b"\xff\xfe")
    assert "is damaged" in cowest("verify", str(bundle), fails=True)


def test_links_and_things_that_are_no_files_do_not_belong_to_a_bundle(
    bundle: Path, tmp_path: Path
) -> None:
    os.mkfifo(bundle / "recipe" / "pipe.py")
    assert "recipe/pipe.py: does not belong to the bundle" in verify_bundle(bundle)
    (bundle / "recipe" / "pipe.py").unlink()
    shutil.move(bundle / "recipe", tmp_path / "recipe")
    (bundle / "recipe").symlink_to(tmp_path / "recipe")
    assert verify_bundle(bundle) == ("recipe: is a link, which a bundle does not have",)


def test_names_are_shown_without_what_a_terminal_would_obey(bundle: Path) -> None:
    (bundle / "recipe" / "\x1b[2K\rbundle is whole.py").write_text("")
    (bundle / os.fsdecode(b"\xff.txt")).write_text("")
    done = CliRunner().invoke(main.app, ["verify", str(bundle)])
    assert (
        done.exit_code == 1
        and "\x1b" not in done.output
        and r"\x1b[2K\rbundle" in done.output
        and r"\udcff.txt" in done.output
    )
    manifest = json.loads((bundle / "cowest.json").read_text())
    (bundle / "cowest.json").write_text(json.dumps({**manifest, "\x1b[2K": 1}))
    with pytest.raises(BundleError, match=re.escape(r"\x1b[2K: Extra inputs")):
        verify_bundle(bundle)


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_what_json_has_no_word_for_is_one_error_and_no_bundle(value: object) -> None:
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        bundles._json({"demos": [{"answer": value}]})


def test_the_message_shows_the_path_that_will_run(bundle: Path, tiny_model: Path) -> None:
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match=re.escape(str(bundle.resolve() / "recipe" / "toy.py"))):
        load_bundle(bundle, weak=weak, strong=weak)


def test_what_is_executed_is_what_was_hashed(
    bundle: Path, tiny_model: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that change after they were verified: each is read once, and what was read must have
    the manifest's hash."""
    check = bundles.open_bundle

    def and_then_changed(path: Any) -> Any:
        opened = check(path)
        (bundle / "recipe" / "toy.py").write_text(OURS.format(mark=mark) + RECIPE)
        return opened

    monkeypatch.setattr(bundles, "open_bundle", and_then_changed)
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match=r"recipe/toy\.py was changed"):
        load_bundle(bundle, weak=weak, strong=weak, trust_recipe=True)
    assert not mark.exists()


def test_a_bundle_at_the_place_of_another_runs_its_own_recipe(
    bundle: Path, tiny_model: Path
) -> None:
    weak = weak_of(tiny_model)
    load_bundle(bundle, weak=weak, strong=weak, trust_recipe=True)
    recipe = bundle / "recipe" / "toy.py"
    recipe.write_text(recipe.read_text() + "\nVERSION = 2\n")
    load_bundle(resealed(bundle), weak=weak, strong=weak, trust_recipe=True)
    assert importing.load(f"{recipe.resolve()}:VERSION") == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", b""),
        ("adapter_config.json", b"{"),
        ("program.json", b'{"a":' * 10_000),
        ("program.json", b"[]"),
        ("config.toml", b"\xff"),
        ("config.toml", b"draft = "),
    ],
)
def test_a_damaged_file_under_a_fitting_manifest_is_one_error(
    file: str, content: bytes, bundle: Path, tiny_model: Path
) -> None:
    (bundle / file).write_bytes(content)
    weak = weak_of(tiny_model)
    with pytest.raises(BundleError, match=re.escape(Path(file).name)) as error:
        load_bundle(resealed(bundle), weak=weak, strong=weak, trust_recipe=True)
    assert len(str(error.value)) < 500


def test_served_is_what_the_reader_named_and_not_what_the_bundle_names(
    bundle: Path, tiny_model: Path, mark: Path
) -> None:
    """A forged config.toml could start any program, send a key of the environment anywhere, or open
    the endpoint to everybody."""
    config, own = bundle / "config.toml", bundle.parent / "own.toml"
    forged = f'[weak]\nkind = "server"\nmodel = "x"\ncommand = ["touch", "{mark}"]\n'
    text = config.read_text().partition("[weak]")[0] + engine_table("strong")
    config.write_text(f'{text}{forged}[serve]\nhost = "0.0.0.0"\nport = 0\napi_key_env = "HOME"\n')
    resealed(bundle)
    assert "name [strong] and [weak] in a TOML of your own" in cowest(
        "serve", str(bundle), "--trust-recipe", fails=True
    )
    model = f'kind = "in_process"\nmodel = "{tiny_model}"\n'
    own.write_text(f"[weak]\n{model}[strong]\n{model}")
    told = cowest("serve", str(bundle), str(own), fails=True)
    assert (
        str(bundle.resolve() / "recipe" / "toy.py") in told
        and "--trust-recipe" in told
        and not mark.exists()
    )
    assert load_config([config, own]).serve.host == "0.0.0.0"

    def rules(port: int | None = None, *changes: str) -> ServeRules:
        read = read_config([config, own], None, [*changes])
        return serving._rules(read, None, port, own=serving._serve_keys([own], [*changes]))

    assert (rules().host, rules().api_key_env) == ("127.0.0.1", "COWEST_API_KEY")
    changed = rules(None, "serve.host=127.0.0.2")
    assert (changed.host, changed.api_key_env) == ("127.0.0.2", "COWEST_API_KEY")
    own.write_text(own.read_text() + '[serve]\nport = 81\nhost = "::1"\n')
    assert (rules(82).host, rules(82).port) == ("::1", 82)
    assert "name [strong] and [weak] in a TOML of your own" in cowest(
        "serve", str(bundle), "--trust-recipe", "--set", "weak.max_tokens=3", fails=True
    )


# A place that is written to again and again


def test_a_reader_sees_the_old_bundle_or_the_new_one(bundle: Path, tmp_path: Path) -> None:
    """Another process replaces the bundle without a pause, while this one reads it."""
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    (other / "README.md").write_text("another")
    resealed(other)

    def replace() -> None:
        for number in range(200):
            work = tmp_path / f"work{number}"
            shutil.copytree(other if number % 2 else bundle, work / "bundle")
            replace_folder(work / "bundle", bundle)
            shutil.rmtree(work)

    process = child(replace)
    seen = set[str]()
    while not (done := os.waitpid(process, os.WNOHANG))[0]:
        seen.add(read_manifest(bundle).files["README.md"])
    assert done[1] == 0 and len(seen) == 2
