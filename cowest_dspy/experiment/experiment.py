"""Config meets code, and only here: a configuration and a run folder, one method per stage.

    with Experiment(load_config([...]), "runs/handbook") as experiment:
        experiment.cycle()

Every stage finds what earlier ones left in the run's store and adds its own; what is there already
is not done again. So a run that was killed goes on where it stood, and a finished one is only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import dspy

from cowest_dspy.errors import ConfigError, PairsError
from cowest_dspy.experiment import data
from cowest_dspy.experiment.answering import answering, kept_arm
from cowest_dspy.experiment.config import ROLES, Config
from cowest_dspy.experiment.config_text import effective_toml
from cowest_dspy.experiment.controls import by_correctness, shuffled
from cowest_dspy.experiment.cycling import Weights, check_steps, cycled
from cowest_dspy.experiment.desk import Desk, check_keys, check_prices
from cowest_dspy.experiment.evaluating import evaluator
from cowest_dspy.experiment.sharding import ShardParts
from cowest_dspy.experiment.summary import arm_of, run_report
from cowest_dspy.experiment.trackers import check_installed
from cowest_dspy.experiment.tracking import Tracking
from cowest_dspy.experiment.weak_models import TuningSettings, WeakModels
from cowest_dspy.influence.collection import collect, noise_floor
from cowest_dspy.influence.metric import Metric
from cowest_dspy.influence.report import NoiseFloor
from cowest_dspy.influence.trace import Sampling, Traces
from cowest_dspy.lms import LocalEngine, ServerEngine, build_lm
from cowest_dspy.optimizers.rounds import Rounds, Task, unpaired
from cowest_dspy.optimizers.router import ROUTER_FILE
from cowest_dspy.optimizers.stages import NoProgress, digest
from cowest_dspy.pairs import PreferencePairs, UnpairedPreferences, at_least
from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.program.examples import check_inputs
from cowest_dspy.report import Arm, RunReport, verdict, write_report
from cowest_dspy.scale import Cluster, merge_shards
from cowest_dspy.store.store import Store
from cowest_dspy.tuning import TunableEngine, tunable
from cowest_dspy.utils.files import write_whole
from cowest_dspy.utils.importing import call, code_of, load_function


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
        settings = TuningSettings.of(config)
        check_prices(config)
        check_steps(config)
        check_installed(config)
        self._cluster = cluster or (Cluster(config.ray) if config.ray else None)
        self.metric: Metric = load_function(config.metric)
        self._owned = store is None
        self.store = store or Store(run, reuse=reuse, budget=config.budget)
        merge_shards(self.store)
        write_whole({self.run / "config.toml": effective_toml(config)})
        # A part of a run is told of with the whole of it.
        self.tracking = Tracking(
            config, self.store, lambda text: self.desk.say(text), on=self._owned
        )
        self.desk = Desk(self.run, self.store, self.progress, config, processes, self.tracking)
        if self._owned:
            self.store.journal.about(task=config.name)
        self._tuned: dspy.LM | None = None
        self._weak_models = WeakModels(
            self.desk, settings, lambda: self.weak, self._make_room, lambda: self.strong
        )

    def close(self, error: BaseException | None = None) -> None:
        """Gives the run folder free, unless the store was given; trackers are told the rest.
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
            processes=self.desk.processes,
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
        program = call(self.config.program, given={"draft": self.config.draft})
        if not isinstance(program, Collaboration):
            raise ConfigError(
                f"{self.config.program} gave {type(program).__name__}: a function that returns a "
                "Collaboration is expected."
            )
        return program

    @cached_property
    def strong(self) -> dspy.LM:
        """The strong LM."""
        lm = build_lm(self.config.strong)
        self.store.count_as_strong(lm.model)
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
        made = {split: data.configured_split(self.config.data, split) for split in data.SPLITS}
        data.check_apart(made, self.config.data.inputs)
        weak = self.config.evaluate.weak
        modules = {"[evaluate] weak": call(weak)} if weak else {}
        for split, examples in made.items():
            check_inputs(self.program, examples[:1], modules=modules, where=split, table=True)
        return made

    @cached_property
    def evaluator(self) -> Metric:
        """What gives an answer its score when drafts are compared: [influence]; by default the
        metric."""
        return evaluator(
            self.config, self.metric, self.program.bind(strong=self.strong), lambda: self.judge
        )

    @property
    def sampling(self) -> Sampling:
        """How a collection samples drafts."""
        rules, margin = self.config.collect, self.config.pairs.margin
        return Sampling(
            rules.drafts,
            rules.temperature,
            rules.top_p,
            self.config.seed,
            adaptive=rules.adaptive,
            margin=margin,
        )

    @cached_property
    def rounds(self) -> Rounds:
        """The rounds: collect, pair, tune, decide."""
        return Rounds(self.desk, self._weak_models.models, self._task, self.config.rounds)

    def _task(self) -> Task:
        """What the rounds work on."""
        config = self.config
        gate = config.pairs.model_dump(exclude={"least", "most", "source"})
        return Task(
            program=self.program.bind(strong=self.strong),
            trainset=self.splits["train"],
            valset=self.splits["dev"],
            metric=self.metric,
            evaluator=self.evaluator,
            tuner=self._weak_models.settings.preferring,
            sampling=self.sampling,
            gate={**gate, "held_out": self._held_out(), "run": self._lineage},
            least=config.pairs.least,
            most=config.pairs.most,
            threads=config.at_once("strong"),
            weak_threads=config.at_once("weak"),
            answers=config.collect.answers,
            max_errors=config.collect.max_errors,
            meaning=self.meaning,
            given=config.pairs.source,
            collect=self._collect_in_shards if self._cluster and config.ray else collect,
        )

    def _collect_in_shards(
        self,
        program: Collaboration,
        examples: Sequence[dspy.Example],
        metric: Metric,
        sampling: Sampling,
        **options: Any,
    ) -> Traces:
        """As ``collect``, on the cluster of [ray]."""
        assert self._cluster is not None
        build = ShardParts.of(self.config, program)
        return self._cluster.collect(build, examples, sampling, **options)

    # Stages

    def sft(self) -> dspy.LM:
        """The weak model after domain fine-tuning; as it is when the configuration has no [sft]."""
        return self._weak_models.drafting()

    def answer_sft(self) -> dspy.LM:
        """The weak model fine-tuned to answer alone: the fair baseline. It starts from the one that
        has learned the domain."""
        return self._weak_models.answering()

    def collect(self) -> Traces:
        """Drafts of the train split and their influence: those of the first round. Of a collection
        that is whole, the calls that failed are made again, and no others."""
        return self.rounds.collected(self.sft(), again=True)

    def noise(self) -> NoiseFloor | None:
        """The noise floor, where [influence] noise asks for it: the strong model alone, asked again
        for so many train examples."""
        count = self.config.influence.noise
        if not count:
            return None
        program = self.program.bind(strong=self.strong)
        identity = digest([self.meaning, program.strong.model, count])
        known = self.store.record("noise", "floor") or {}
        if known.get("identity") != identity:
            with self.desk.stage("noise", "Measuring the noise floor") as progress:
                threads, examples = self.config.at_once("strong"), self.splits["train"][:count]
                floor = noise_floor(
                    program,
                    examples,
                    self.evaluator,
                    self.sampling,
                    store=self.store,
                    num_threads=threads,
                    on_progress=progress,
                )
            known = {"floor": asdict(floor) if floor else None, "identity": identity}
            self.store.keep("noise", "floor", known)
        return NoiseFloor(**known["floor"]) if known["floor"] else None

    def pairs(self) -> PreferencePairs:
        """The preference pairs of the first round, or of [pairs] source, also written to
        ``pairs.jsonl`` in the run folder."""
        return self.rounds.paired(self._drafting())

    def check_collected(self, command: str) -> None:
        """Sees that the run has drafts to make pairs of, or is given pairs; asks nothing.

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
        drafts = self.rounds.labelled(self.sft())
        drafts.save(self.run / "drafts.jsonl")
        return drafts

    def tune(self) -> dspy.LM:
        """The weak model after all rounds of preference tuning: that of the last round that was
        taken.

        Raises:
            PairsError: the first round gave fewer pairs than [pairs] least.
        """
        if self._tuned is None:
            self._tuned, _ = self.rounds.run(self.sft())
        return self._tuned

    @cached_property
    def final(self) -> Collaboration:
        """The program on the models that all tuning ended with: after [cycle], otherwise after the
        rounds."""
        if self.config.cycle is None:
            return self.program.bind(weak=self.tune(), strong=self.strong)
        weak = self.sft() if "sft" in self.config.cycle.names else self.weak
        weights = Weights(self.desk, self._task, self.config.seed, self._make_room, self.weak)
        return cycled(
            self.program.bind(weak=weak, strong=self.strong),
            weights,
            self.desk,
            self.splits,
            self.evaluator,
        )

    def control(self, name: str) -> dspy.LM:
        """The weak model of a control arm, trained from where preference tuning started, on the
        rows of its first round."""
        if name == "by_correctness":
            pairs = by_correctness(self.rounds.collected(self._drafting()), self._task().gate)
            pairs = at_least(
                pairs.at_most(self.config.pairs.most, seed=self.config.seed),
                self.config.pairs.least,
            )
            rows = (
                pairs.rows(lineage=False)
                if self.config.kto is None
                else unpaired(pairs.rows(lineage=False))
            )
            return self._weak_models.preferring(
                name, "Control: drafts ranked by their own answers", rows
            )
        if self.config.cycle and "weights" in self.config.cycle.names:
            _ = self.final  # There the drafts are of the program as it was at that step.
            rows = self.rounds.kept_rows(1)
        else:
            rows = self.rounds.rows(self._drafting())
        if name == "shuffled":
            return self._weak_models.preferring(
                name, "Control: shuffled labels", shuffled(rows, self.config.seed)
            )
        return (
            self._weak_models.fine_tuned_more(name)
            if name == "more_sft"
            else self._weak_models.on_chosen(name, rows)
        )

    def controlled(self, name: str) -> Collaboration:
        """The program of a control arm: it differs from the tuned one in its weights, and not in
        its prompts."""
        weak = self.control(name)
        return (
            self.final.bind(weak=weak)
            if self.config.cycle
            else self.program.bind(weak=weak, strong=self.strong)
        )

    def evaluate(self, names: Sequence[str] | None = None) -> tuple[Arm, ...]:
        """The arms of these names (default: all that the configuration declares) on the held-out
        split, and keeps them."""
        return tuple(self._arm(name) for name in names or self.arm_names())

    def arm_names(self) -> list[str]:
        """The arms that the configuration declares, in the order of the table."""
        wanted = self.config.evaluate
        weak = ["weak"] if wanted.weak else []
        oracle = ["oracle"] if wanted.oracle else []
        prompted = ["strong_prompted"] if self.config.cycle and self.config.cycle.steps else []
        routed = ["routed"] if (self.run / ROUTER_FILE).is_file() else []
        return [
            *weak,
            "strong",
            *prompted,
            "collaboration_sft",
            "collaboration",
            *routed,
            *oracle,
            *wanted.controls,
        ]

    def cycle(self) -> RunReport:
        """All stages: fine-tune, collect, pair, tune, evaluate, report."""
        self.desk.say(f"run {self.run}, configuration {self.config.name}, seed {self.config.seed}")
        _ = self.splits
        self.sft()
        if self.config.evaluate.weak:
            self.answer_sft()
        if self.config.cycle is None:
            self.desk.say(
                f"{len(self.splits['train'])} examples gave {len(self.pairs())} preference pairs"
            )
        self.noise()
        _ = self.final
        for control in self.config.evaluate.controls:
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
        weak = (self._weak_models.kept(final) if final else None) or self.sft()
        return self.program.bind(weak=weak, strong=self.strong)

    # How stages are done

    @cached_property
    def meaning(self) -> str:
        """What answers depend on besides model ids: settings, prompts, and the code of the
        recipes."""
        parts = self.config
        code = code_of(
            [
                parts.program,
                parts.metric,
                parts.data.source,
                parts.evaluate.weak,
                parts.influence.rubric,
            ]
        )
        # Neither what comes after answers, nor where they are made.
        after = (
            "budget",
            "compare",
            "evaluate",
            "pairs",
            "dpo",
            "kto",
            "rounds",
            "report",
            "serve",
            "tracking",
            "cycle",
            "sft",
            "ray",
        )
        aside = {
            **dict.fromkeys([*after, "ray"], True),
            "data": {"test"},
            "influence": {"noise"},
        }
        settings = parts.model_dump(mode="json", exclude=aside)  # pyright: ignore[reportArgumentType]
        return digest([settings, code, self.program.dump_state()])

    @property
    def _lineage(self) -> str:
        """The run's name in the lineage of its pairs: of its configuration, so that equal runs in
        two folders have equal pairs."""
        return f"{self.config.name}, seed {self.config.seed}"

    def _drafting(self) -> dspy.LM:
        """Whose drafts the first round's pairs are; of pairs from elsewhere nobody's here, so that
        nothing is trained for them."""
        return self.weak if self.config.pairs.source else self.sft()

    def _held_out(self) -> list[dspy.Example]:
        return [*self.splits["dev"], *self.splits["test"]]

    def _make_room(self) -> None:
        """Lets go of weights, and of servers of ours, while something is trained; the next question
        loads them again."""
        check_keys(self.config)
        _ = self.splits  # What is wrong with the data is said before hours are spent on a training.
        loaded = [self.__dict__[role] for role in ("strong", "judge") if role in self.__dict__]
        for lm in (self.weak, *loaded):
            engine = getattr(lm, "engine", None)
            if isinstance(engine, LocalEngine | ServerEngine):
                engine.close()

    def _arm(self, name: str) -> Arm:
        asking, models = answering(self, name)
        wanted = self.config.evaluate
        return kept_arm(
            self,
            arm_of(name, self.config, self.store),
            asking,
            self.splits[wanted.split],
            record="arm",
            depends_on=[self.meaning, models, wanted.model_dump(mode="json", exclude={"controls"})],
            threads=self.config.at_once("weak" if name == "weak" else "strong"),
        )
