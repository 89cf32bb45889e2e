"""The configurations of the algorithms that learn from preferences: DPO, KTO, ORPO and CPO."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.rules import sequences_fit_model
from megarl.config.sections.data import LabelledDataConfig, PairDataConfig
from megarl.config.sections.run import AccuracyCheckpointConfig
from megarl.config.sections.trainer import TrainerConfig
from megarl.config.trees import TrainingTree

KINDS = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
"""As in `algorithms.preference.DPO_KINDS`; a test compares them, since importing that takes seconds."""
SMOOTHED = ("sigmoid", "robust", "exo_pair")
WITH_REFERENCE = ("resident", "cached", "none")


@dataclass
class ReferenceSettings(Section):
    """The reference model of a preference loss."""

    name: ClassVar[str] = ""
    """Name of the section."""

    reference: str = leaf(
        "cached",
        "Where the log-probs of the reference come from. cached: they are computed before training and stored on disk, "
        "and no second model is held; resident: a second model on the device computes them in every step; none: they "
        "count as 0.",
        WITH_REFERENCE,
    )
    reference_path: str | None = leaf(
        None,
        "Reference model: a Hugging Face folder or hub name, or a megarl checkpoint (null: the weights that the policy "
        "starts from).",
    )
    cache: str = leaf(
        "~/.cache/megarl", "Folder in which the log-probs of references are kept for this and later runs."
    )

    def check(self) -> None:
        """Refuse a reference that is named and not used."""
        if self.reference == "none" and self.reference_path is not None:
            key = f"{self.name}.reference_path"
            raise Refusal(
                f"{key}={self.reference_path} has no effect with {self.name}.reference=none",
                {key: [None], f"{self.name}.reference": ["cached", "resident"]},
                key=key,
                value=self.reference_path,
            )


@dataclass
class DPOSettings(ReferenceSettings):
    """Direct preference optimisation."""

    name: ClassVar[str] = "dpo"

    beta: float = leaf(0.1, "How strongly the policy is tied to the reference.", above=0)
    kind: str = leaf(
        "sigmoid",
        "Loss of a pair. sigmoid: DPO; ipo: IPO, which uses log-probs averaged over the response; robust: DPO for "
        "labels of which the share dpo.label_smoothing is wrong; exo_pair: EXO; nca_pair: NCA; sppo_hard: SPPO; "
        "apo_zero, apo_down: APO; hinge: SLiC.",
        KINDS,
    )
    mix: dict[str, float] = leaf(
        {}, "Weights of several kinds whose losses are added, as in {sigmoid: 0.8, ipo: 0.2}. It replaces dpo.kind."
    )
    label_smoothing: float = leaf(
        0.0,
        "Assumed share of pairs whose responses are swapped. Only for sigmoid, robust (below 0.5) and exo_pair (above "
        "0).",
        at_least=0,
        below=1,
    )
    average_logprobs: bool = leaf(
        False, "Divide the log-prob of a response by its number of tokens, so that long responses do not weigh more."
    )
    sft_coef: float = leaf(
        0.0, "Weight of the cross entropy of the preferred response, which is added to the loss (RPO).", at_least=0
    )

    @property
    def kinds(self) -> dict[str, float]:
        """The weight of each kind."""
        return self.mix or {self.kind: 1.0}

    def check(self) -> None:
        """Refuse unknown kinds, and a label smoothing that a kind does not have."""
        for kind in self.mix:
            if kind not in KINDS:
                raise Refusal(
                    f"dpo.mix has the kind {kind!r}, which does not exist",
                    {},
                    f"one of {', '.join(KINDS)}",
                    key="dpo.mix",
                    value=kind,
                )
            if not self.mix[kind] > 0:
                raise Refusal(
                    f"dpo.mix has the weight {self.mix[kind]:g} of {kind}",
                    {},
                    "weights above 0",
                    key="dpo.mix",
                    value=self.mix[kind],
                )
        for kind in self.kinds:
            self._check_smoothing(kind)
        super().check()

    def _check_smoothing(self, kind: str) -> None:
        smoothing = self.label_smoothing
        if kind not in SMOOTHED:
            problem = f"{kind} has no label smoothing" if smoothing else None
            offers: list[float] = [0.0]
        elif kind == "exo_pair":
            problem, offers = ("exo_pair needs a label smoothing above 0" if smoothing == 0 else None), [0.001]
        else:
            wrong = kind == "robust" and smoothing >= 0.5
            problem, offers = ("robust needs a label smoothing below 0.5" if wrong else None), [0.1]
        if problem:
            raise Refusal(
                f"dpo.label_smoothing={smoothing:g}: {problem}",
                {} if self.mix else {"dpo.label_smoothing": offers},
                "kinds that agree in dpo.mix" if self.mix else None,
                key="dpo.label_smoothing",
                value=smoothing,
            )


@dataclass
class KTOSettings(ReferenceSettings):
    """Kahneman-Tversky optimisation."""

    name: ClassVar[str] = "kto"

    beta: float = leaf(0.1, "How strongly the policy is tied to the reference.", above=0)
    desirable_weight: float = leaf(1.0, "Weight of the loss of desirable responses.", at_least=0)
    undesirable_weight: float = leaf(1.0, "Weight of the loss of undesirable responses.", at_least=0)


@dataclass
class ORPOSettings(Section):
    """Odds-ratio preference optimisation."""

    beta: float = leaf(0.1, "Weight of the odds ratio beside the cross entropy of the preferred response.", above=0)


@dataclass
class CPOSettings(Section):
    """Contrastive preference optimisation, and SimPO."""

    kind: str = leaf(
        "sigmoid",
        "Loss of a pair, without a reference. simpo: SimPO, whose log-probs are averaged over the response.",
        ("sigmoid", "hinge", "ipo", "simpo"),
    )
    beta: float = leaf(0.1, "Scale of the difference of log-probs. SimPO usually takes 2 or more.", above=0)
    gamma: float = leaf(0.5, "Only for simpo: margin by which the preferred response should lead.", at_least=0)
    label_smoothing: float = leaf(
        0.0, "Assumed share of pairs whose responses are swapped. Only for sigmoid and simpo.", at_least=0, below=1
    )
    sft_coef: float = leaf(
        1.0, "Weight of the cross entropy of the preferred response; SimPO is usually trained with 0.", at_least=0
    )

    def check(self) -> None:
        """Refuse a label smoothing that the kind does not have."""
        if self.label_smoothing and self.kind not in ("sigmoid", "simpo"):
            raise Refusal(
                f"cpo.label_smoothing={self.label_smoothing:g}: cpo.kind={self.kind} has no label smoothing",
                {"cpo.label_smoothing": [0.0], "cpo.kind": ["sigmoid", "simpo"]},
                key="cpo.label_smoothing",
                value=self.label_smoothing,
            )


def batch_has_two_responses(config: Any, world_size: int) -> None:
    """The KL estimate of KTO joins each prompt with the response to another one."""
    if config.trainer.global_batch_size < 2:
        raise Refusal(
            "trainer.global_batch_size=1 leaves no other response for the KL estimate of KTO",
            {"trainer.global_batch_size": [2, 16]},
            key="trainer.global_batch_size",
            value=1,
        )


@dataclass
class PreferenceTree(TrainingTree):
    """The keys of every algorithm that learns from preferences."""

    rules: ClassVar[tuple[Rule, ...]] = (*TrainingTree.rules, sequences_fit_model)
    own: ClassVar[str] = ""
    """Name of the section of the algorithm."""

    checkpoint: AccuracyCheckpointConfig = section(AccuracyCheckpointConfig)
    data: PairDataConfig = section(PairDataConfig)
    trainer: TrainerConfig = section(TrainerConfig)

    @property
    def reference(self) -> ReferenceSettings:
        """Settings of the reference model; of an algorithm without one, that there is none."""
        return ReferenceSettings(reference="none")

    def more_folders(self) -> dict[str, str]:
        """Return the folder of the reference's log-probs."""
        used = self.reference
        return {f"{self.own}.cache": used.cache} if used.reference == "cached" else {}

    def more_models(self) -> dict[str, str]:
        """Return the path of the reference."""
        used = self.reference
        path = None if used.reference == "none" else used.reference_path
        return {} if path is None else {f"{self.own}.reference_path": path}


@dataclass
class DPOConfig(PreferenceTree):
    """The keys of direct preference optimisation."""

    own: ClassVar[str] = "dpo"
    dpo: DPOSettings = section(DPOSettings)

    @property
    def reference(self) -> ReferenceSettings:
        """Settings of the reference model."""
        return self.dpo


@dataclass
class KTOConfig(PreferenceTree):
    """The keys of Kahneman-Tversky optimisation."""

    rules: ClassVar[tuple[Rule, ...]] = (*PreferenceTree.rules, batch_has_two_responses)

    data: LabelledDataConfig = section(LabelledDataConfig)
    own: ClassVar[str] = "kto"
    kto: KTOSettings = section(KTOSettings)

    @property
    def reference(self) -> ReferenceSettings:
        """Settings of the reference model."""
        return self.kto


@dataclass
class ORPOConfig(PreferenceTree):
    """The keys of odds-ratio preference optimisation."""

    own: ClassVar[str] = "orpo"
    orpo: ORPOSettings = section(ORPOSettings)


@dataclass
class CPOConfig(PreferenceTree):
    """The keys of contrastive preference optimisation."""

    own: ClassVar[str] = "cpo"
    cpo: CPOSettings = section(CPOSettings)
