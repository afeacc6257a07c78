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
from dataclasses import dataclass, field, replace
from pathlib import Path

import dspy

from cowest_dspy.errors import ConfigError, CowestError, masked, nearest
from cowest_dspy.experiment import data
from cowest_dspy.experiment.config import ROLES, Config, validate
from cowest_dspy.experiment.forecast import Forecast, Planned, Probe, forecast, planned_calls
from cowest_dspy.experiment.probing import Level, Task, ask_one, prompt_for
from cowest_dspy.experiment.trackers import check_trackers
from cowest_dspy.lms import LocalEngine, ServerEngine, build_lm, endpoints
from cowest_dspy.lms.api import estimate_cost
from cowest_dspy.lms.config import Api, Engine, InProcess, LMSettings, Server
from cowest_dspy.lms.local import weights
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import check_inputs, possible_inputs
from cowest_dspy.scale import check_cluster
from cowest_dspy.tuning import DPO, KTO, SFT
from cowest_dspy.tuning.data import sft_rows
from cowest_dspy.utils.importing import call, load_function, takes

LOOKED_AT = 50
# Of a model whose tokenizer is not here. English has some four characters to a token; a prompt of
# numbers has fewer.
CHARACTERS_PER_TOKEN = 3.5


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: of whom ("task", "weak", "strong", "judge" or "run"), what, how
    it is, and what to do."""

    role: str
    name: str
    level: Level
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """Every check, one measured answer for each model that gave one, and what a whole cycle would
    ask of them."""

    checks: tuple[Check, ...]
    probes: tuple[Probe, ...] = ()
    planned: tuple[Planned, ...] = ()
    forecasts: tuple[Forecast, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no check is an error."""
        return all(check.level != "error" for check in self.checks)

    def measured(self) -> list[str]:
        """The measured answers and the forecasts as lines for people."""
        lines = [
            f"{probe.role} said: {probe.first_line}  ({probe.seconds:.1f} s, {probe.input_tokens} "
            "tokens in, "
            f"{probe.output_tokens} out, {probe.tokens_per_second:.1f} tokens/s)"
            for probe in self.probes
        ]
        for made in self.forecasts:
            usd = (
                "price unknown"
                if made.usd is None
                else f"about {made.usd:.2f} USD"
                if made.usd
                else "nothing to pay"
            )
            lines.append(
                f"a cycle asks {made.role} at most {made.calls} times: about "
                f"{_count(made.input_tokens)} tokens in, "
                f"{_count(made.output_tokens)} out; {usd}; between about {_time(made.minutes)} "
                f"({made.at_once} at once, each as "
                f"fast as one) and {_time(made.minutes_one_by_one)} (one by one)"
            )
        if self.forecasts:
            unknown = [
                f"{stage.stage} ({stage.unknown})" for stage in self.planned if stage.unknown
            ]
            lines += (
                [f"That is without {', '.join(unknown)}: nobody knows how often it asks."]
                if unknown
                else []
            )
            lines.append(
                "Estimated from one answer each, measured alone. Tuning is not in it, nor what a "
                "run has answered."
            )
        return lines


@dataclass
class _Visit:
    """The examination of one configuration while it goes on."""

    config: Config
    ask: bool
    say: Callable[[str], None]
    task: Task | None = None
    free_memory: int = 0
    needed_memory: int = 0
    checks: list[Check] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    opened: list[dspy.LM] = field(default_factory=list)

    def note(self, role: str, name: str, level: Level, text: str) -> None:
        self.checks.append(Check(role, name, level, masked(text)))


def examine(
    config: Config, *, ask: bool = True, say: Callable[[str], None] = lambda text: None
) -> Diagnosis:
    """Examines the task and each model of ``config``.

    ``ask=False`` asks no question, so that nothing is paid; weights in this process are loaded all
    the same. ``say`` is told of what takes long or costs money, before it happens.
    """
    import psutil

    visit = _Visit(config, ask, say, free_memory=psutil.virtual_memory().available)
    visit.task = _examine_task(visit)
    for role in ROLES:
        settings: LMSettings | None = getattr(config, role)
        if settings is not None:
            _surviving(visit, role, settings)
    for found in check_trackers(config):
        visit.note("run", found.tracker, found.level, found.text)
    if config.ray is not None:
        level, text = check_cluster(config.ray, Path("runs") / config.name)
        visit.note("run", "cluster", level, text)
    for lm in visit.opened:
        # Only now: in a run all weights are in memory together, so they are here.
        getattr(lm.engine, "close", lambda: None)()
    planned = planned_calls(config, visit.task.sizes) if visit.task else ()
    return Diagnosis(
        tuple(visit.checks), tuple(visit.probes), planned, _forecasts(config, planned, visit.probes)
    )


def _surviving(visit: _Visit, role: str, settings: LMSettings) -> None:
    """Examines one model. Whatever libraries, servers and a user's own engine raise is a finding
    here, and no end."""
    try:
        _examine_model(visit, role, settings)
    except CowestError as error:
        visit.note(role, "model", "error", str(error))
    except Exception as error:
        visit.note(role, "model", "error", f"{type(error).__name__}: {error}")


# The task


def _examine_task(visit: _Visit) -> Task | None:
    config = visit.config
    try:
        validate(DPO, config.dpo, "[dpo]")
        validate(KTO, config.kto or {}, "[kto]")
        if config.sft:
            validate(SFT, config.sft.settings, "[sft.settings]")
            validate(SFT, config.sft.answer_settings, "[sft.answer_settings]")
        compared = config.compare.also if config.compare else ()
        taught = (config.sft.drafts, config.sft.answers) if config.sft else ()
        for reference in (config.metric, config.evaluate.weak, *taught, *compared):
            if reference:
                load_function(reference)
        program = call(config.program, given={"draft": config.draft})
        if not isinstance(program, Collaboration):
            raise ConfigError(
                f"{config.program} gave {type(program).__name__}: a Collaboration is expected."
            )
        splits = {split: data.configured_split(config.data, split) for split in data.SPLITS}
        data.check_apart(splits, config.data.inputs)
        modules = {"[evaluate] weak": call(config.evaluate.weak)} if config.evaluate.weak else {}
        for split, examples in splits.items():
            check_inputs(program, examples[:1], modules=modules, where=split, table=True)
    except CowestError as error:
        visit.note("task", "task", "error", str(error))
        return None
    except Exception as error:  # of a user's own functions
        visit.note("task", "task", "error", f"{type(error).__name__}: {error}")
        return None
    sizes = {split: len(examples) for split, examples in splits.items()}
    visit.note(
        "task",
        "task",
        "ok",
        ", ".join(f"{size} {split} examples" for split, size in sizes.items() if size),
    )
    _note_oracle(visit, splits[config.evaluate.split])
    _note_unsure_inputs(visit, program)
    task = Task(program, max(splits["train"][:LOOKED_AT], key=_length), sizes)
    _note_lessons(visit, prompt_for(task, "weak"))
    return task


def _note_unsure_inputs(visit: _Visit, program: Collaboration) -> None:
    """Warns of inputs of predictors that neither [data] names nor another predictor gives: a module
    of one's own may make them."""
    given = {*visit.config.data.inputs, program.draft_field}
    for part, module in (("draft", program.draft), ("refine", program.refine)):
        unknown = sorted(possible_inputs(module) - given)
        if unknown:
            names = ", ".join(f'"{name}"' for name in unknown)
            what = (
                f"{part} ({type(module).__name__}) has a predictor with the input {names}, "
                "which [data] inputs does not name"
            )
            text = (
                f"{what}: right where the module makes it itself; otherwise the model is asked "
                "without it"
            )
            visit.note("task", "inputs", "warning", text)


def _note_oracle(visit: _Visit, examples: Sequence[dspy.Example]) -> None:
    """Whether the examples of the table have the background that [evaluate] oracle names."""
    name = visit.config.evaluate.oracle
    lacking = [example for example in examples if name and not example.get(name)]
    if lacking:
        split = visit.config.evaluate.split
        text = (
            f'{len(lacking)} of {len(examples)} {split} examples have no "{name}", which '
            "[evaluate] oracle names"
        )
        visit.note(
            "task",
            "oracle",
            "error",
            f"{text}.{nearest(str(name), lacking[0].keys())} Without a ceiling, leave oracle out",
        )


def _note_lessons(visit: _Visit, asked: list[dict[str, str]]) -> None:
    """Whether [sft] has rows, in the form in which drafts will be asked for. Rows that the strong
    model makes are not asked for."""
    sft, own = visit.config.sft, visit.config.data
    if sft is None or takes(sft.drafts, "strong"):
        return
    try:
        given = {"seed": own.seed, "rows": own.rows, "draft": visit.config.draft}
        rows = sft_rows(call(sft.drafts, given=given))
    except Exception as error:  # also of a user's own function
        text = str(error) if isinstance(error, CowestError) else f"{type(error).__name__}: {error}"
        visit.note("task", "[sft] drafts", "error", text)
        return
    alike = sum(row["prompt"][:-1] == asked[:-1] for row in rows)
    text = f"{len(rows)} rows, {alike} with the instructions that drafts are asked for with"
    if alike:
        visit.note("task", "[sft] drafts", "ok", text)
    else:
        text += (
            ": it would learn to answer another prompt. Make prompts as the program does: "
            "adapter.format(signature, [], inputs)"
        )
        visit.note("task", "[sft] drafts", "warning", text)


def _length(example: dspy.Example) -> int:
    return sum(len(str(value)) for value in example.inputs().values())


# One model


def _examine_model(visit: _Visit, role: str, settings: LMSettings) -> None:
    visit.say(f"{role}: looking at {masked(settings.model)}")
    _examine_adapters(visit, role, settings)
    if isinstance(settings, InProcess):
        lm = build_lm(settings)
        visit.opened.append(lm)
        ready = _examine_weights(visit, role, settings, lm)
    else:
        if not _examine_endpoint(visit, role, settings):
            return
        # One question, one answer: a retry would hide what is wrong, and take minutes.
        once = (
            settings
            if isinstance(settings, Engine)
            else settings.model_copy(update={"num_retries": 0})
        )
        lm, ready = build_lm(once), True
        if isinstance(settings, Server):
            visit.opened.append(lm)
            _examine_server(visit, role, settings, lm)
    if ready and visit.ask and visit.task:
        _ask(visit, visit.task, role, settings, lm)


def _examine_weights(visit: _Visit, role: str, settings: InProcess, lm: dspy.LM) -> bool:
    """Looks at a folder, and loads its weights. Gives whether the model can be asked."""
    engine = lm.engine
    if not isinstance(engine, LocalEngine):
        raise ConfigError(f"{settings.model} was not built as a model in this process.")
    folder = Path(engine.base_folder)
    tokenizer = weights.load_tokenizer(folder)
    visit.note(role, "chat template", "ok", "there is one")
    prompt = prompt_for(visit.task, role) if visit.task else []
    tokens = (
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        if prompt
        else None
    )
    _note_context(visit, role, weights.context_length(folder), tokens, "")
    if not _enough_memory(visit, role, weights.memory_needed(folder, settings.dtype)):
        return False
    visit.say(f"{role}: loading {settings.model}")
    started = time.monotonic()
    # The likelihood of one word: loads the weights and shows that they compute, and no token is
    # sampled.
    engine.score([([{"role": "user", "content": "Hello"}], "Hello")], lm.model)
    visit.note(role, "model", "ok", f"{lm.model}, loaded in {time.monotonic() - started:.1f} s")
    return True


def _examine_server(visit: _Visit, role: str, settings: Server, lm: dspy.LM) -> None:
    """Sees that the server answers, and has the adapter that it is to have; starts it when it is
    ours."""
    if isinstance(lm.engine, ServerEngine):
        visit.say(
            f"{role}: starting {settings.model}"
            if settings.command
            else f"{role}: asking for {settings.model}"
        )
        started = time.monotonic()
        lm.engine.require(lm.model)
        visit.note(role, "server", "ok", f"answers after {time.monotonic() - started:.1f} s")


def _enough_memory(visit: _Visit, role: str, needed: int) -> bool:
    """Whether these weights fit beside those of the models before: in a run all of them are in
    memory together."""
    visit.needed_memory += needed
    text = (
        f"about {_gigabytes(visit.needed_memory)} for all weights so far, "
        f"{_gigabytes(visit.free_memory)} are free"
    )
    if visit.needed_memory > visit.free_memory:
        text += (
            '. Not loaded: free some memory, take a smaller model, or dtype = "int8" for one '
            "that is not tuned"
        )
        visit.note(role, "memory", "error", text)
        return False
    if visit.needed_memory > 0.8 * visit.free_memory:
        visit.note(
            role,
            "memory",
            "warning",
            f"{text}. Batches and tuning take more: lower concurrency if it gets short",
        )
        return True
    visit.note(role, "memory", "ok", text)
    return True


def _examine_endpoint(visit: _Visit, role: str, settings: Api | Server | Engine) -> bool:
    """Reaches for an endpoint whose address is known. Gives whether the model can be built and
    asked."""
    prompt = prompt_for(visit.task, role) if visit.task else []
    tokens = (
        round(sum(len(message["content"]) for message in prompt) / CHARACTERS_PER_TOKEN)
        if prompt
        else None
    )
    if isinstance(settings, Engine) or not settings.api_base:
        visit.note(role, "model", "ok", f"{settings.model}: {_how_it_is_reached(settings)}")
        _note_context(visit, role, None, tokens, "about ")
        return True
    found = endpoints.check_endpoint(settings)
    visit.note(role, "model", found.level, found.text)
    if found.level == "error":
        return False
    _note_context(visit, role, found.context, tokens, "about ")
    return True


def _how_it_is_reached(settings: Api | Server | Engine) -> str:
    """Of a model without an address to look at: a question will tell."""
    if isinstance(settings, Engine):
        return "an engine of your own"
    return (
        "a server that is started for it"
        if isinstance(settings, Server)
        else "at its provider's address"
    )


def _note_context(
    visit: _Visit, role: str, context: int | None, tokens: int | None, about: str
) -> None:
    """Whether the longest early prompt, a draft where there will be one, and ``max_tokens`` fit
    together."""
    settings: LMSettings = getattr(visit.config, role)
    size = "length unknown: the model does not say it" if context is None else f"{context} tokens"
    if tokens is None:
        visit.note(role, "context", "ok", f"{size}; no prompt to compare it with")
        return
    draft = 0 if role == "weak" else visit.config.weak.max_tokens
    parts = (
        f"{about}{tokens} of the prompt{f' + {draft} of a draft' if draft else ''} + "
        f"max_tokens = {settings.max_tokens}"
    )
    fits = context is None or tokens + draft + settings.max_tokens <= context
    advice = (
        ""
        if fits
        else (
            f". Lower [{role}] max_tokens, shorten the program's demos, or take a model with a "
            "longer context"
        )
    )
    visit.note(
        role,
        "context",
        "ok" if fits else "error",
        f"{size}; {parts}{'' if fits else ': too long'}{advice}",
    )


def _examine_adapters(visit: _Visit, role: str, settings: LMSettings) -> None:
    """Whether the model takes adapters: only the weak one needs them, and only when something is to
    be tuned."""
    missing = _no_adapters(settings)
    if role != "weak":
        return
    if missing is None:
        visit.note(role, "adapters", "ok", "it takes adapters, so it can be tuned")
    elif visit.config.sft or visit.config.dpo or visit.config.kto is not None:
        table = "[kto]" if visit.config.kto is not None else "[dpo]"
        visit.note(
            role,
            "adapters",
            "error",
            f"it cannot be tuned, and the task has [sft] or {table}: {missing}",
        )
    else:
        visit.note(
            role,
            "adapters",
            "warning",
            f"it cannot be tuned, so `cowest tune` and `cycle` will stop: {missing}",
        )


def _no_adapters(settings: LMSettings) -> str | None:
    """Why a model takes no adapter, and what to write instead; None when it takes one."""
    if isinstance(settings, InProcess):
        return 'weights in int8 take none, set dtype = "auto"' if settings.dtype == "int8" else None
    if not isinstance(settings, Server):
        return f'kind = "{settings.kind}" takes none, use kind = "in_process"'
    if settings.server == "openai":
        return 'server = "openai" takes none, use "llama_cpp", "vllm" or kind = "in_process"'
    return None if settings.weights else "say with weights = ... which folder or Hub id it serves"


def _ask(visit: _Visit, task: Task, role: str, settings: LMSettings, lm: dspy.LM) -> None:
    """Asks one train question as a run would, and keeps what it took."""
    paid = (
        f" This is paid for ({masked(settings.model)}); --no-ask leaves it out."
        if isinstance(settings, Api)
        else ""
    )
    visit.say(f"{role}: one question is asked.{paid}")
    answered = ask_one(task, role, lm)
    if answered.probe:
        visit.probes.append(answered.probe)
    visit.note(role, "answer", answered.level, answered.text)


# What it would cost


def _forecasts(
    config: Config, planned: tuple[Planned, ...], probes: Sequence[Probe]
) -> tuple[Forecast, ...]:
    """For each model that a cycle asks; without a [judge] of its own, the judge's questions are the
    strong model's."""
    if config.judge is None:
        planned = tuple(
            replace(stage, strong=stage.strong + stage.judge, judge=0) for stage in planned
        )
    draft = next((probe.output_tokens for probe in probes if probe.role == "weak"), 0)
    made: list[Forecast] = []
    for probe in probes:
        if sum(getattr(stage, probe.role) for stage in planned):
            settings: LMSettings = getattr(config, probe.role)
            plain = forecast(planned, probe, settings, draft if probe.role == "strong" else 0)
            made.append(replace(plain, usd=_usd(settings, plain.input_tokens, plain.output_tokens)))
    return tuple(made)


def _usd(settings: LMSettings, input_tokens: int, output_tokens: int) -> float | None:
    """US dollars of so many tokens; 0 for what runs on one's own machines, None when no price is
    known."""
    return (
        estimate_cost(settings, input_tokens, output_tokens) if isinstance(settings, Api) else 0.0
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _time(minutes: float) -> str:
    return (
        f"{minutes / 60:.1f} hours"
        if minutes >= 120
        else f"{minutes:.0f} minutes"
        if minutes >= 2
        else f"{minutes * 60:.0f} s"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
