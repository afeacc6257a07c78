"""Config meets code, and only here: a configuration and a run folder, one method per stage.

    with Experiment(load_config([...]), "runs/handbook") as experiment:
        experiment.cycle()

Every stage finds what earlier ones left in the run's store and adds its own; what is there already
is not done again. So a run that was killed goes on where it stood, and a finished one is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError, PairsError, TooFewPairs, TuningError
from cowest_dspy.experiment import arms, data, settings
from cowest_dspy.experiment.config import ROLES, Config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.cycling import RoundsStep, build_cycle
from cowest_dspy.experiment.sharding import collect_on
from cowest_dspy.experiment.summary import run_report
from cowest_dspy.experiment.trackers import check_installed
from cowest_dspy.experiment.tracking import Tracking
from cowest_dspy.influence.collection import collect
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.noise import noise_floor
from cowest_dspy.influence.report import NoiseFloor
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.lms import LocalEngine, ServerEngine, build_lm
from cowest_dspy.optimizers.cowest import CoWest, Rounds
from cowest_dspy.optimizers.cycle import check_steps
from cowest_dspy.optimizers.router import ROUTER_FILE
from cowest_dspy.optimizers.run import NoProgress, RunContext, TrainedModels
from cowest_dspy.pairs import PreferencePairs, UnpairedPreferences
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.report import Arm, RunReport, verdict, write_report
from cowest_dspy.scale import Cluster, merge_shards
from cowest_dspy.store.call_context import keeping
from cowest_dspy.store.record import recorded
from cowest_dspy.store.store import Store
from cowest_dspy.tuning import DPO, KTO, SFT, TunableEngine, engine_of, tunable
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.importing import load_function, takes

UNTUNED = (
    "What there is without tuning is shown by `cowest evaluate` with --arm strong --arm "
    "collaboration_sft."
)


class Experiment:
    """A configuration and its run folder.

    Args:
        config: the whole configuration.
        run: the run's folder; made when it is not there.
        progress: shows it.
        reuse: other runs' folders whose answers may be taken over, where the very same call was
            made there.
        processes: that train together, one for each GPU, or on the CPU where there is none; or a
            file of Accelerate's (tuning.md).
        store: an open one, which stays open; ``reuse`` and [budget] are then its own.
        cluster: of the run that this is a part of.

    Raises:
        ConfigError: settings of tuning that TRL or PEFT would not take; [budget] usd, and an API
            whose price is not known; Ray or a tracker that is not installed.
        StoreError: the folder is in use or damaged.
    """

    def __init__(
        self,
        config: Config,
        run: str | Path,
        *,
        progress: NoProgress | None = None,
        reuse: Sequence[str | Path] = (),
        processes: int | str | Path = 1,
        store: Store | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self.config, self.run, self.progress = config, Path(run), progress or NoProgress()
        self.settings = settings.TuningSettings.of(config)
        settings.check_prices(config)
        check_steps(config.cycle)
        check_installed(config)
        self._cluster = cluster or (Cluster(config.ray) if config.ray else None)
        self._processes = processes
        self.metric: Metric = load_function(config.metric)
        self._owned = store is None
        self.store = store or Store(run, reuse=reuse, budget=config.budget)
        merge_shards(self.store)
        write_whole({self.run / "config.toml": effective_toml(config)})
        # A part of a run is told of with the whole of it.
        say = RunContext(self.store, self.progress).say
        self.tracking = Tracking(config, self.store, say, on=self._owned)
        self.context = RunContext(self.store, self.progress, self.tracking)
        if self._owned:
            self.store.journal.about(task=config.name)
        self._tuned: dspy.LM | None = None

    def close(self, error: BaseException | None = None) -> None:
        """Give the run folder free, unless the store was given; send the rest to trackers.
        ``error`` is what ended the work."""
        if self._owned:
            try:
                self.tracking.close(lambda: run_report(self.config, self.store), error)
            finally:
                self.store.close(error)
                if self._cluster is not None:
                    self._cluster.close()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close(error)

    def variant(self, name: str, config: Config) -> Experiment:
        """The same run under other settings, as a part of it: calls, budget and models that are the
        same are shared; records and files are its own, in ``variants/NAME`` of the run's folder.
        Needs no closing."""
        store = self.store.within(name)
        made = Experiment(
            config,
            store.folder,
            progress=self.progress,
            processes=self._processes,
            store=store,
            cluster=self._cluster,
        )
        for role in ROLES:
            if getattr(config, role) == getattr(self.config, role):
                made.__dict__[role] = getattr(self, role)
        return made

    # What the configuration means

    @cached_property
    def program(self) -> Collaboration:
        """The recipe's program, not bound yet."""
        return data.load_program(self.config)

    @cached_property
    def strong(self) -> dspy.LM:
        """The strong LM."""
        lm = build_lm(self.config.strong)
        self.store.set_strong(lm.model)
        return lm

    @cached_property
    def judge(self) -> dspy.LM:
        """The judge's LM: that of [judge], or the strong one."""
        return build_lm(self.config.judge) if self.config.judge else self.strong

    @cached_property
    def weak(self) -> dspy.LM:
        """The weak LM as it was before any tuning; tunable when its weights are here and its engine
        takes adapters."""
        lm = build_lm(self.config.weak)
        return tunable(lm) if isinstance(lm.engine, TunableEngine) else lm

    @cached_property
    def splits(self) -> dict[str, list[dspy.Example]]:
        """The examples of train, dev and test; the same inputs in two splits are an error, and so
        is one that the program lacks."""
        return data.load_splits(self.config, self.program)

    @cached_property
    def evaluator(self) -> Metric:
        """The scorer of answers when drafts are compared: [influence]; by default the metric."""
        judge = self.judge if "judge" in self.config.influence.weights else None
        bound = self.program.bind(strong=self.strong)
        return settings.build_evaluator(self.config.influence, self.metric, bound, judge)

    @property
    def sampling(self) -> Sampling:
        """How a collection samples drafts."""
        rules, seed = self.config.collect, self.config.seed
        drafts = (rules.drafts, rules.temperature, rules.top_p, seed)
        return Sampling(*drafts, adaptive=rules.adaptive, margin=self.config.pairs.margin)

    @cached_property
    def optimizer(self) -> CoWest:
        """The rounds' settings."""
        config = self.config
        return CoWest(
            self.metric,
            self.settings.preferring,
            rounds=config.rounds,
            evaluator=self.evaluator,
            sampling=self.sampling,
            pairs=config.pairs,
            answers=config.collect.answers,
            max_errors=config.collect.max_errors,
            num_threads=config.at_once("strong"),
            weak_threads=config.at_once("weak"),
            seed=config.seed,
        )

    @cached_property
    def rounds(self) -> Rounds:
        """The rounds: collect, pair, tune, decide."""
        return self._rounds(self.program.bind(strong=self.strong), self.meaning)

    def _rounds(self, program: Collaboration, depends_on: str, first: int = 1) -> Rounds:
        # Equal runs in two folders have equal pairs: they are of a configuration, not of a folder.
        config = self.config
        lineage = f"{config.name}, seed {config.seed}"
        return Rounds(
            self.optimizer,
            self.context,
            self.trained,
            program,
            self.splits["train"],
            self.splits["dev"],
            held_out=self.splits["test"],
            lineage=lineage,
            depends_on=depends_on,
            collecting=collect_on(self._cluster, config) if self._cluster else collect,
            first=first,
        )

    @cached_property
    def trained(self) -> TrainedModels:
        """The weak models that were trained in this run."""
        room, processes = self._make_room, self._processes
        return TrainedModels(
            self.context, self.weak, self.config.seed, make_room=room, processes=processes
        )

    # Stages

    def sft(self) -> dspy.LM:
        """The weak model after domain fine-tuning; as it is when the configuration has no [sft]."""
        if self.config.sft is None:
            return self.weak
        return self._train(
            "drafts", "SFT of the drafter", self.weak, self._sft_rows, self.settings.drafting
        )

    def answer_sft(self) -> dspy.LM:
        """The weak model fine-tuned to answer alone: the fair baseline. It starts from the one that
        has learned the domain."""
        answers = self.config.sft.answers if self.config.sft else None
        if answers is None:
            return self.weak
        return self._train(
            "answers",
            "SFT of the weak baseline",
            self.sft(),
            lambda: self._teaching_rows(answers, "answers"),
            self.settings.answering,
        )

    def collect(self) -> Traces:
        """Drafts of the train split and their influence: those of the first round. Of a collection
        that is whole, the calls that failed are made again, and no others."""
        return self.rounds.collect(self.sft(), again=True)

    def noise(self) -> NoiseFloor | None:
        """The noise floor, where [influence] noise asks for it: the strong model alone, asked again
        for so many train examples."""
        count = self.config.influence.noise
        if not count:
            return None
        program = self.program.bind(strong=self.strong)

        def measure() -> dict[str, Any]:
            with self.context.stage("noise", "Measuring the noise floor") as progress:
                floor = noise_floor(
                    program,
                    self.splits["train"][:count],
                    self.evaluator,
                    self.sampling,
                    store=self.store,
                    num_threads=self.config.at_once("strong"),
                    on_progress=progress,
                )
            return {"floor": asdict(floor) if floor else None}

        depends_on = [self.meaning, program.strong.model, count]
        step = self.store.step("noise", "floor", depends_on, measure)
        return NoiseFloor(**step["floor"]) if step["floor"] else None

    def pairs(self) -> PreferencePairs:
        """The preference pairs of the first round, or of [pairs] source, also written to
        ``pairs.jsonl`` in the run folder."""
        return self.rounds.pair(self._drafter())

    def check_collected(self, command: str) -> None:
        """Check that the run has drafts to make pairs of, or is given pairs; asks nothing.

        Args:
            command: what collects drafts in this run, for the message.

        Raises:
            PairsError: there are none.
        """
        if not self.config.pairs.source and not self.store.count("trace"):
            raise PairsError(
                f"There are no pairs yet: no drafts were collected in {self.run}. Collect them "
                f"first: {command}"
            )

    def labelled(self) -> UnpairedPreferences:
        """The collected drafts as those that helped and those that hurt, also written to
        ``drafts.jsonl`` in the run folder."""
        drafts = self.rounds.unpaired(self.sft())
        drafts.save(self.run / "drafts.jsonl")
        return drafts

    def tune(self) -> dspy.LM:
        """The weak model after all rounds of preference tuning: that of the last round that was
        taken.

        Raises:
            PairsError: the first round gave fewer pairs than [pairs] least.
        """
        if self._tuned is None:
            _ = self.splits  # Rows are checked first, then whether the weak model can be tuned.
            self._check_tunable()
            with _telling_what_needs_no_tuning():
                self._tuned, _ = self.rounds.run_all(self.sft())
        return self._tuned

    @cached_property
    def final(self) -> Collaboration:
        """The program on the models that all tuning ended with: after [cycle], otherwise after the
        rounds."""
        if self.config.cycle is None:
            return self.program.bind(weak=self.tune(), strong=self.strong)
        if not self.splits["dev"]:
            raise ConfigError(
                "[cycle] compares its candidates on the dev split, and there is none: give the "
                "data a dev split."
            )
        weak = self.sft() if "sft" in self.config.cycle.names else self.weak
        program = self.program.bind(weak=weak, strong=self.strong)
        cycle = build_cycle(
            self.config,
            self.metric,
            self.evaluator,
            RoundsStep(self.meaning, self._rounds),
            self.meaning,
            progress=self.progress,
        )
        with keeping(self.store), _telling_what_needs_no_tuning():
            return cycle.compile(program, trainset=self.splits["train"], valset=self.splits["dev"])

    def control(self, name: str) -> dspy.LM:
        """The weak model of a control arm, trained from where preference tuning started, on the
        rows of its first round."""
        preferring = self.settings.preferring
        if name == "by_correctness":
            traces = arms.by_correctness(self.rounds.collect(self._drafter()))
            rows = self.rounds.rows_of(traces)
            title = "Control: drafts ranked by their own answers"
            return self._train(name, title, self.sft(), rows, preferring)
        if self.config.cycle and "weights" in self.config.cycle.names:
            _ = self.final  # There the drafts are of the program as it was at that step.
            rows = self.rounds.saved_rows(1)
        else:
            rows = self.rounds.rows(self._drafter())
        if name == "shuffled":
            rows = arms.shuffled(rows, self.config.seed)
            return self._train(name, "Control: shuffled labels", self.sft(), rows, preferring)
        drafting = self.settings.drafting
        if name == "more_sft":
            if self.config.sft is None:
                raise ConfigError(f"The control {name} continues [sft], and there is no [sft].")
            return self._train(name, "Control: more SFT", self.sft(), self._sft_rows, drafting)
        # As long as preference tuning.
        longer = {"num_train_epochs": preferring.num_train_epochs, "max_steps": None}
        return self._train(
            name,
            "Control: SFT on the chosen drafts",
            self.sft(),
            arms.chosen_rows(rows),
            drafting.model_copy(update=longer),
        )

    def controlled(self, name: str) -> Collaboration:
        """The program of a control arm: it differs from the tuned one in its weights, and not in
        its prompts."""
        weak = self.control(name)
        program = self.final if self.config.cycle else self.program.bind(strong=self.strong)
        return program.bind(weak=weak)

    def evaluate(self, names: Sequence[str] | None = None) -> tuple[Arm, ...]:
        """The arms of these names (default: all that the configuration declares) on the held-out
        split, and records them."""
        return tuple(arms.evaluate_arm(self, name) for name in names or self.arm_names())

    def arm_names(self) -> list[str]:
        """The arms that the configuration declares, in the order of the table."""
        return arms.arm_names(self.config, routed=(self.run / ROUTER_FILE).is_file())

    def cycle(self) -> RunReport:
        """All stages: fine-tune, collect, pair, tune, evaluate, report."""
        say, config = self.context.say, self.config
        say(f"run {self.run}, configuration {config.name}, seed {config.seed}")
        _ = self.splits
        self.sft()
        if config.evaluate.weak:
            self.answer_sft()
        if config.cycle is None:
            say(f"{len(self.splits['train'])} examples gave {len(self.pairs())} preference pairs")
        self.noise()
        _ = self.final
        for control in config.evaluate.controls:
            self.control(control)
        self.evaluate()
        return self.report()

    def report(self) -> RunReport:
        """What the run has so far, written as ``report.json`` and ``report.html`` in its folder."""
        made = run_report(self.config, self.store)
        write_report(made, self.run)
        self.tracking.touch()
        self.store.journal.about(verdict=verdict(made).sentences[0])
        return made

    def ask(self, **inputs: Any) -> dspy.Prediction:
        """The collaboration's answer to one input, with the best weak model that the run has."""
        return self.best(**inputs)

    @property
    def best(self) -> Collaboration:
        """The program on the best weak model that the run has: nothing is tuned for it but [sft],
        where that is missing."""
        if self.config.cycle is not None:
            return self.final
        final = (self.store.record("final", "weak") or {}).get("adapter")
        weak = (self.trained.find(final) if final else None) or self.sft()
        return self.program.bind(weak=weak, strong=self.strong)

    # How stages are done

    @cached_property
    def meaning(self) -> str:
        """What answers depend on besides model ids: settings, prompts, and the code of the
        recipes."""
        return settings.digest_of_answers(self.config, self.program)

    def _drafter(self) -> dspy.LM:
        """Whose drafts the first round's pairs are; of pairs from elsewhere nobody's here, so that
        nothing is trained for them."""
        return self.weak if self.config.pairs.source else self.sft()

    def _train(
        self, name: str, title: str, start: dspy.LM, rows: Any, how: SFT | DPO | KTO
    ) -> dspy.LM:
        self._check_tunable()
        return self.trained.train(name, title, start, rows, how)

    def _check_tunable(self) -> None:
        try:
            engine_of(self.weak)
        except TuningError as error:
            raise TuningError(
                f'{error} In a TOML set kind = "in_process" for [weak]; or kind = "server" with '
                f'weights and server = "llama_cpp" or "vllm". {UNTUNED}'
            ) from None
        if getattr(self.config.weak, "dtype", None) == "int8":
            raise TuningError(
                "A model in int8 takes no adapter, so it cannot be tuned: set [weak] dtype = "
                '"auto".'
            )

    def _sft_rows(self) -> list[dict[str, Any]]:
        assert self.config.sft is not None
        return self._teaching_rows(self.config.sft.drafts, "drafts")

    def _teaching_rows(self, reference: str, which: str) -> list[dict[str, Any]]:
        """The rows of a function of [sft]; one that takes ``strong`` may ask it for rationales."""
        if not takes(reference, "strong"):
            return data.sft_rows(self.config, reference, which)
        title = "Asking the strong model what to teach"
        with self.context.stage(f"rows {which}", title) as progress, keeping(self.store):
            return data.sft_rows(
                self.config, reference, which, strong=recorded(self.strong), progress=progress
            )

    def _make_room(self) -> None:
        """Lets go of weights, and of servers of ours, while something is trained; the next question
        loads them again."""
        settings.check_keys(self.config)
        _ = self.splits  # What is wrong with the data is said before hours are spent on a training.
        loaded = [self.__dict__[role] for role in ("strong", "judge") if role in self.__dict__]
        for lm in (self.weak, *loaded):
            engine = getattr(lm, "engine", None)
            if isinstance(engine, LocalEngine | ServerEngine):
                engine.close()


@contextmanager
def _telling_what_needs_no_tuning() -> Iterator[None]:
    """A context whose TooFewPairs names the commands that are left."""
    try:
        yield
    except TooFewPairs as few:
        raise TooFewPairs(f"{few} {UNTUNED}", few.found, few.shortage) from few
