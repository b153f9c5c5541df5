"""Options of an adaptation, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm_reference.config import ConfigError
from ldm_reference.optimisation import Optimisation

from ldm_export.errors import InputError
from ldm_export.reading.options import check_between, check_least, check_one_of

LAYERS = ("attention", "all")
PRECISIONS = ("no", "bf16", "fp16")
SAVE_EVERY = 50
"""Steps between states on disk."""


@dataclass(frozen=True)
class Factors:
    """Shape of the LoRA that is trained.

    Attributes
    ----------
    rank : of every layer's factors
    alpha : the change is alpha / rank times their product; the rank itself by default
    layers : "attention", the projections of attentions, or "all", every linear layer and convolution
    """

    rank: int = 8
    alpha: float | None = None
    layers: str = "attention"

    def __post_init__(self) -> None:
        check_least("rank", self.rank, 1)
        check_one_of("layers", self.layers, LAYERS)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"alpha = {self.alpha} is no number above 0. Give one, such as the rank.")


@dataclass(frozen=True)
class AdaptOptions:
    """How a model is taught; see `ldm_reference.optimisation.Optimisation` for the schedules.

    Attributes
    ----------
    factors : the LoRA's
    steps : updates of the factors
    batch_size : pictures an update; as many class pictures come on top where there are any
    prior_weight : of the class pictures' loss (DreamBooth, 2208.12242, eq. 2)
    ema_decay : of the averaged factors, which are what is kept; 0 keeps the last
    mixed_precision : no, bf16, or fp16 (on a GPU)
    """

    factors: Factors = Factors()
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup_steps: int = 10
    prior_weight: float = 1.0
    ema_decay: float = 0.98
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("prior_weight", self.prior_weight, 0.0, 1000.0)
        check_one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        check_between("seed", self.seed, 0, 2**32 - 1)
        self.optimisation(prior=False)

    def optimisation(self, *, prior: bool) -> Optimisation:
        """Options of the loop, whose batches hold class pictures, too, where there is a ``prior``."""
        try:
            return Optimisation(
                steps=self.steps,
                batch_size=self.batch_size * (1 + prior),
                learning_rate=self.learning_rate,
                warmup_steps=self.warmup_steps,
                schedule=self.schedule,
                ema_decay=self.ema_decay,
                save_every=SAVE_EVERY,
            )
        except ConfigError as error:
            raise InputError(f"{error}.") from error
