"""The doctor: whether each model of a configuration can do its part, found out before a run is
begun.

    diagnosis = examine(load_config([...]))
    diagnosis.healthy, [check.text for check in diagnosis.checks]

Every check is ok, a warning or an error, and says what to do. A model that fails does not keep the
others from being checked. Nothing is written, no run folder is made, and what was loaded is let go
of at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.lm15 import InvalidRequestError, Request, Response

from cowest_dspy.errors import ConfigError, CowestError, masked, nearest
from cowest_dspy.experiment.config import ROLES, Config
from cowest_dspy.experiment.data import load_program, load_splits
from cowest_dspy.experiment.quote import StageCalls, count_calls, estimate_minutes
from cowest_dspy.experiment.settings import TuningSettings
from cowest_dspy.experiment.trackers import check_trackers
from cowest_dspy.influence.metric import attempt
from cowest_dspy.lms import LocalEngine, ServerEngine, build_lm, endpoints
from cowest_dspy.lms.api import estimate_cost
from cowest_dspy.lms.config import Api, Engine, InProcess, LMSettings, Server
from cowest_dspy.lms.local import weights
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import possible_inputs
from cowest_dspy.scale import check_cluster
from cowest_dspy.store.serialize import request_messages
from cowest_dspy.tuning.data import sft_rows
from cowest_dspy.utils.importing import call, load_function, takes

LOOKED_AT = 50
"""Train examples of which the longest is asked."""
LONGEST_LINE = 80
# Where the tokenizer is not here. English has some four characters to a token; a prompt of numbers
# has fewer.
CHARACTERS_PER_TOKEN = 3.5
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: of which ``role`` ("task", "weak", "strong", "judge" or "run"),
    what, how it is, and what to do."""

    role: str
    name: str
    level: Level
    text: str


@dataclass(frozen=True)
class AnswerProbe:
    """One answer of a model that was measured: its first line, and what it took."""

    role: str
    first_line: str
    seconds: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Diagnosis:
    """Every check, one measured answer for each model that gave one, and what a whole cycle would
    ask of them, as lines."""

    checks: tuple[Check, ...]
    probes: tuple[AnswerProbe, ...] = ()
    forecast: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no check is an error."""
        return all(check.level != "error" for check in self.checks)

    def describe_answers(self) -> list[str]:
        """The measured answers and the forecast as lines for people."""
        return [
            *(
                f"{probe.role} said: {probe.first_line}  ({probe.seconds:.1f} s, "
                f"{probe.input_tokens} tokens in, {probe.output_tokens} out, "
                f"{probe.output_tokens / max(probe.seconds, 1e-9):.1f} tokens/s)"
                for probe in self.probes
            ),
            *self.forecast,
        ]


@dataclass(frozen=True)
class _Task:
    """What models would be asked: the program, one example, and the size of each split."""

    program: Collaboration
    inputs: dict[str, Any]
    sizes: dict[str, int]


@dataclass
class _Visit:
    """The examination of one configuration while it goes on."""

    config: Config
    ask: bool
    say: Callable[[str], None]
    free_memory: int
    task: _Task | None = None
    needed_memory: int = 0
    checks: list[Check] = field(default_factory=list)
    probes: list[AnswerProbe] = field(default_factory=list)
    opened: list[dspy.LM] = field(default_factory=list)

    def note(self, role: str, name: str, level: Level, text: str) -> None:
        """Add a check."""
        self.checks.append(Check(role, name, level, masked(text)))

    def attempt(self, role: str, name: str, work: Callable[[], None]) -> None:
        """Do some work. Whatever it raises is a check: libraries, servers and a user's own code
        raise anything."""
        try:
            work()
        except Exception as error:
            kind = "" if isinstance(error, CowestError) else f"{type(error).__name__}: "
            self.note(role, name, "error", f"{kind}{error}")


def examine(
    config: Config, *, ask: bool = True, say: Callable[[str], None] = lambda text: None
) -> Diagnosis:
    """Examine the task and each model of ``config``.

    ``ask=False`` asks no question, so that nothing is paid; weights in this process are loaded all
    the same. ``say`` gets what takes long or costs money, before it happens.
    """
    import psutil

    visit = _Visit(config, ask, say, psutil.virtual_memory().available)
    visit.attempt("task", "task", lambda: _examine_task(visit))
    for role in ROLES:
        if getattr(config, role) is not None:
            visit.attempt(role, "model", lambda role=role: _examine_model(visit, role))
    for tracker, level, text in check_trackers(config):
        visit.note("run", tracker, level, text)
    if config.ray is not None:
        visit.note("run", "cluster", *check_cluster(config.ray, Path("runs") / config.name))
    for lm in visit.opened:
        # Only now: in a run all weights are in memory together, so they are here.
        getattr(lm.engine, "close", lambda: None)()
    stages = count_calls(config, visit.task.sizes) if visit.task else []
    return Diagnosis(
        tuple(visit.checks), tuple(visit.probes), tuple(_forecast(config, stages, visit.probes))
    )


# The task


def _examine_task(visit: _Visit) -> None:
    config = visit.config
    TuningSettings.of(config)
    compared = config.compare.also if config.compare else ()
    taught = (config.sft.drafts, config.sft.answers) if config.sft else ()
    for reference in (config.metric, config.evaluate.weak, *taught, *compared):
        if reference:
            load_function(reference)
    program = load_program(config)
    splits = load_splits(config, program)
    sizes = {split: len(examples) for split, examples in splits.items()}
    text = ", ".join(f"{size} {split} examples" for split, size in sizes.items() if size)
    visit.note("task", "task", "ok", text)
    _note_oracle(visit, splits[config.evaluate.split])
    _note_unsure_inputs(visit, program)
    longest = max(
        (dict(example.inputs().items()) for example in splits["train"][:LOOKED_AT]),
        key=lambda inputs: sum(len(str(value)) for value in inputs.values()),
    )
    visit.task = _Task(program, longest, sizes)
    if config.sft and not takes(config.sft.drafts, "strong"):  # Which would be asked for rows.
        visit.attempt("task", "[sft] drafts", lambda: _note_lessons(visit))


def _note_unsure_inputs(visit: _Visit, program: Collaboration) -> None:
    """Warn of inputs of predictors that neither [data] names nor another predictor gives: a module
    of one's own may make them."""
    given = {*visit.config.data.inputs, program.draft_field}
    for part, module in (("draft", program.draft), ("refine", program.refine)):
        unknown = sorted(possible_inputs(module) - given)
        if unknown:
            names = ", ".join(f'"{name}"' for name in unknown)
            text = (
                f"{part} ({type(module).__name__}) has a predictor with the input {names}, "
                "which [data] inputs does not name: right where the module makes it itself; "
                "otherwise the model is asked without it"
            )
            visit.note("task", "inputs", "warning", text)


def _note_oracle(visit: _Visit, examples: Sequence[dspy.Example]) -> None:
    """Note an error where examples lack the background that [evaluate] oracle names."""
    name, split = visit.config.evaluate.oracle, visit.config.evaluate.split
    lacking = [example for example in examples if name and not example.get(name)]
    if lacking:
        text = (
            f'{len(lacking)} of {len(examples)} {split} examples have no "{name}", which '
            f"[evaluate] oracle names.{nearest(str(name), lacking[0].keys())} Without a ceiling, "
            "leave oracle out"
        )
        visit.note("task", "oracle", "error", text)


def _note_lessons(visit: _Visit) -> None:
    """Note whether [sft] has rows, in the form in which drafts will be asked for."""
    sft = visit.config.sft
    assert sft is not None
    given = {**visit.config.data.given, "draft": visit.config.draft}
    rows = sft_rows(call(sft.drafts, given=given))
    asked = _prompt_for(visit, "weak")
    alike = sum(row["prompt"][:-1] == asked[:-1] for row in rows)
    text = f"{len(rows)} rows, {alike} with the instructions that drafts are asked for with"
    if not alike:
        text += (
            ": it would learn to answer another prompt. Make prompts as the program does: "
            "adapter.format(signature, [], inputs)"
        )
    visit.note("task", "[sft] drafts", "ok" if alike else "warning", text)


# One model


def _examine_model(visit: _Visit, role: str) -> None:
    settings: LMSettings = getattr(visit.config, role)
    visit.say(f"{role}: looking at {masked(settings.model)}")
    if role == "weak":
        _note_adapters(visit, settings)
    if isinstance(settings, InProcess):
        lm = build_lm(settings)
        visit.opened.append(lm)
        if not _examine_weights(visit, role, settings, lm):
            return
    else:
        if not _reach_endpoint(visit, role, settings):
            return
        # One question, one answer: a retry would hide what is wrong, and take minutes.
        once = {} if isinstance(settings, Engine) else {"num_retries": 0}
        lm = build_lm(settings.model_copy(update=once))
        if isinstance(settings, Server):
            visit.opened.append(lm)
            _examine_server(visit, role, settings, lm)
    if visit.ask and visit.task:
        _ask(visit, visit.task, role, settings, lm)


def _examine_weights(visit: _Visit, role: str, settings: InProcess, lm: dspy.LM) -> bool:
    """Look at a model's folder, and load its weights. Gives whether the model can be asked."""
    engine = lm.engine
    if not isinstance(engine, LocalEngine):
        raise ConfigError(f"{settings.model} was not built as a model in this process.")
    folder = Path(engine.base_folder)
    tokenizer = weights.load_tokenizer(folder)
    visit.note(role, "chat template", "ok", "there is one")
    prompt = _prompt_for(visit, role)
    tokens = (
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        if prompt
        else None
    )
    _note_context(visit, role, weights.context_length(folder), tokens, "")
    if not _fits_memory(visit, role, weights.memory_needed(folder, settings.dtype)):
        return False
    visit.say(f"{role}: loading {settings.model}")
    started = time.monotonic()
    # The likelihood of one word: loads the weights and shows that they compute, and no token is
    # sampled.
    engine.score([([{"role": "user", "content": "Hello"}], "Hello")], lm.model)
    visit.note(role, "model", "ok", f"{lm.model}, loaded in {time.monotonic() - started:.1f} s")
    return True


def _fits_memory(visit: _Visit, role: str, needed: int) -> bool:
    """Whether these weights fit beside those of the models before: in a run all of them are in
    memory together."""
    visit.needed_memory += needed
    part = visit.needed_memory / visit.free_memory
    advice = ""
    if part > 1:
        advice = (
            '. Not loaded: free some memory, take a smaller model, or dtype = "int8" for one '
            "that is not tuned"
        )
    elif part > 0.8:
        advice = ". Batches and tuning take more: lower concurrency if it gets short"
    text = (
        f"about {visit.needed_memory / 1e9:.1f} GB for all weights so far, "
        f"{visit.free_memory / 1e9:.1f} GB are free{advice}"
    )
    visit.note(role, "memory", "error" if part > 1 else "warning" if advice else "ok", text)
    return part <= 1


def _reach_endpoint(visit: _Visit, role: str, settings: Api | Server | Engine) -> bool:
    """Reach for an endpoint whose address is known. Gives whether the model can be asked."""
    context = None
    if isinstance(settings, Engine):
        visit.note(role, "model", "ok", f"{settings.model}: an engine of your own")
    elif not settings.api_base:
        own = isinstance(settings, Server)
        where = "a server that is started for it" if own else "at its provider's address"
        visit.note(role, "model", "ok", f"{settings.model}: {where}")
    else:
        found = endpoints.check_endpoint(settings)
        visit.note(role, "model", found.level, found.text)
        if found.level == "error":
            return False
        context = found.context
    characters = sum(len(message["content"]) for message in _prompt_for(visit, role))
    tokens = round(characters / CHARACTERS_PER_TOKEN) or None
    _note_context(visit, role, context, tokens, "about ")
    return True


def _examine_server(visit: _Visit, role: str, settings: Server, lm: dspy.LM) -> None:
    """See that the server answers, and has the adapter that it is to have; start it when it is
    ours."""
    if isinstance(lm.engine, ServerEngine):
        doing = "starting" if settings.command else "asking for"
        visit.say(f"{role}: {doing} {settings.model}")
        started = time.monotonic()
        lm.engine.require(lm.model)
        visit.note(role, "server", "ok", f"answers after {time.monotonic() - started:.1f} s")


def _note_context(
    visit: _Visit, role: str, context: int | None, tokens: int | None, about: str
) -> None:
    """Note whether the longest early prompt, a draft where there will be one, and ``max_tokens``
    fit together."""
    settings: LMSettings = getattr(visit.config, role)
    size = "length unknown: the model does not say it" if context is None else f"{context} tokens"
    if tokens is None:
        visit.note(role, "context", "ok", f"{size}; no prompt to compare it with")
        return
    draft = 0 if role == "weak" else visit.config.weak.max_tokens
    text = (
        f"{size}; {about}{tokens} of the prompt{f' + {draft} of a draft' if draft else ''} + "
        f"max_tokens = {settings.max_tokens}"
    )
    fits = context is None or tokens + draft + settings.max_tokens <= context
    if not fits:
        text += (
            f": too long. Lower [{role}] max_tokens, shorten the program's demos, or take a model "
            "with a longer context"
        )
    visit.note(role, "context", "ok" if fits else "error", text)


def _note_adapters(visit: _Visit, settings: LMSettings) -> None:
    """Note whether the weak model takes adapters, which it needs when something is to be tuned."""
    config, why = visit.config, _no_adapters(settings)
    level: Level = "ok"
    text = "it takes adapters, so it can be tuned"
    if why and (config.sft or config.dpo or config.kto is not None):
        table = "[kto]" if config.kto is not None else "[dpo]"
        level, text = "error", f"it cannot be tuned, and the task has [sft] or {table}: {why}"
    elif why:
        level = "warning"
        text = f"it cannot be tuned, so `cowest tune` and `cycle` will stop: {why}"
    visit.note("weak", "adapters", level, text)


def _no_adapters(settings: LMSettings) -> str | None:
    """Why a model takes no adapter, and what to write instead; None when it takes one."""
    if isinstance(settings, InProcess):
        return 'weights in int8 take none, set dtype = "auto"' if settings.dtype == "int8" else None
    if not isinstance(settings, Server):
        return f'kind = "{settings.kind}" takes none, use kind = "in_process"'
    if settings.server == "openai":
        return 'server = "openai" takes none, use "llama_cpp", "vllm" or kind = "in_process"'
    return None if settings.weights else "say with weights = ... which folder or Hub id it serves"


# One question


class _NoModel:
    """An engine that keeps the prompts of requests and refuses them."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"max_tokens", "temperature", "top_p", "stop", "seed"})

    def __init__(self) -> None:
        self.prompts: list[list[dict[str, str]]] = []

    def complete(self, request: Request) -> Response:
        """Never answers."""
        self.prompts.append(request_messages(request))
        raise InvalidRequestError("This engine only keeps prompts.")

    stream = complete

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoModel:
        return self


def _prompt_for(visit: _Visit, role: str) -> list[dict[str, str]]:
    """The messages of the first call that the model in this role would get; for a strong one with
    an empty draft. Empty where there is no task, or the program asks no model in this role."""
    if visit.task is None:
        return []
    engine, inputs = _NoModel(), visit.task.inputs
    lm = dspy.LM(
        "no/model", engine=engine, cache=False, num_retries=0, temperature=0.0, max_tokens=1
    )
    bound = visit.task.program.bind(weak=lm, strong=lm)
    attempt(
        lambda: bound.ask_draft(**inputs) if role == "weak" else bound.ask_refine("-", **inputs)
    )
    return engine.prompts[0] if engine.prompts else []


def _ask(visit: _Visit, task: _Task, role: str, settings: LMSettings, lm: dspy.LM) -> None:
    """Ask one train question as a run would, and note what it took: a draft of the weak model, of
    any other an answer without a draft."""
    paid = (
        f" This is paid for ({masked(settings.model)}); --no-ask leaves it out."
        if isinstance(settings, Api)
        else ""
    )
    visit.say(f"{role}: one question is asked.{paid}")
    bound = task.program.bind(weak=lm, strong=lm)
    started = time.monotonic()
    made = attempt(
        lambda: bound.ask_draft(**task.inputs) if role == "weak" else bound.ask_alone(**task.inputs)
    )
    seconds = time.monotonic() - started
    if made.calls:
        first_line = (made.calls[-1].text.strip().splitlines() or ["(nothing)"])[0]
        tokens_in = sum(call.input_tokens for call in made.calls)
        tokens_out = sum(call.output_tokens for call in made.calls)
        line = masked(first_line)[:LONGEST_LINE]
        visit.probes.append(AnswerProbe(role, line, seconds, tokens_in, tokens_out))
    level: Level = "warning"
    if made.error is None:
        level, text = "ok", "it answered a train question in the program's form"
    elif not made.calls:
        level, text = "error", f"it did not answer. {made.error}"
    elif made.error.startswith("truncated"):
        text = (
            "it was cut off at max_tokens, which a run counts as failed: tune it first, or raise "
            "max_tokens"
        )
    else:
        text = (
            "it answered, but not in the program's form, which a run counts as failed. "
            f"{made.error}"
        )
    visit.note(role, "answer", level, text)


# What a cycle would ask


def _forecast(
    config: Config, stages: Sequence[StageCalls], probes: Sequence[AnswerProbe]
) -> list[str]:
    """A line for each model that a cycle asks, its calls times what one answer took."""
    draft = next((probe.output_tokens for probe in probes if probe.role == "weak"), 0)
    ratings = config.influence.repeats if config.influence.judge else 0
    judged = sum(stage.scored.most for stage in stages) * ratings
    lines: list[str] = []
    for probe in probes:
        answers = sum(stage.answers.most for stage in stages)
        calls = {
            "weak": sum(stage.drafts.most for stage in stages),
            "strong": answers if config.judge else answers + judged,
            "judge": judged,
        }[probe.role]
        if not calls:
            continue
        settings = config.settings_of(probe.role)
        tokens_in = calls * probe.input_tokens
        if probe.role == "strong":  # A draft stands in each prompt but those of the arm alone.
            alone = sum(one.answers.most for one in stages if one.stage == "evaluate strong")
            tokens_in += (calls - alone) * draft
        tokens_out = calls * probe.output_tokens
        cost = "nothing to pay"
        if isinstance(settings, Api):
            usd = estimate_cost(settings, round(tokens_in), round(tokens_out))
            cost = "price unknown" if usd is None else f"about {usd:.2f} USD"
        each = (tokens_in + tokens_out) / calls
        fast = estimate_minutes(settings, calls, probe.seconds, each)
        slow = max(calls * probe.seconds / 60, fast)
        at_once = max(1, min(settings.concurrency, round(calls)))
        lines.append(
            f"a cycle asks {probe.role} at most {calls:.0f} times: about {_format(tokens_in)} "
            f"tokens in, {_format(tokens_out)} out; {cost}; between about {_time(fast)} "
            f"({at_once} at once, each as fast as one) and {_time(slow)} (one by one)"
        )
    if lines:
        unknown = [f"{stage.stage} ({stage.unknown})" for stage in stages if stage.unknown]
        if unknown:
            lines.append(f"That is without {', '.join(unknown)}: nobody knows how often it asks.")
        lines.append(
            "Estimated from one answer each, measured alone. Tuning is not in it, nor what a "
            "run has answered."
        )
    return lines


def _format(count: float) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,.0f}"


def _time(minutes: float) -> str:
    if minutes >= 120:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{minutes * 60:.0f} s"
