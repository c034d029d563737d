import math
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_opt._lightning.log_rows import is_log_step
from lightning_opt.registry import register
from lightning_opt.solvers.consensus import AlphaSchedule, ConsensusSettings, Noise, Scheme, SigmaSchedule, Swarm

from ._candidates import Vectorize
from ._gradient_free import GradientFreeStrategy


@register(
    "strategy",
    summary="Consensus-based optimization: trains from loss values by particles, over ranks",
    paper="2306.09778",
    card="consensus-based-optimization",
    log_prefix="cbo",
    aliases={"cbo": {}},
)
class CBOStrategy(GradientFreeStrategy):
    """Trains a module from the values of its loss, by consensus-based optimization.

    ``Trainer(strategy="cbo")``. Particles in the space of parameters drift towards their mean, weighted by
    ``exp(-alpha loss)``, with noise in proportion to their distance from it. On every training batch each particle is
    evaluated once. The module holds the consensus, which is validated and saved. For losses without a useful gradient
    and small models; where there is a gradient, training with it is faster and more accurate.

    Particles are shared out over ranks, and every rank evaluates its own on the same batch. What travels in a move is
    one number a particle and, with ``scheme="cbo"``, one vector as large as the model. ``scheme="hopping"`` sends no
    vector: the candidates are drawn anew around the consensus in every step, and each rank draws those of the others
    again; its memory is that of a few candidates.

    A run is the same on any number of ranks: bit for bit with hopping (on CPUs), and to rounding with particles. It
    resumes bit for bit, also on another number of ranks.

    Logs ``cbo/best_loss`` (of the particles, in the last move), ``cbo/consensus_loss``, ``cbo/alpha``, ``cbo/sigma``,
    ``cbo/ess`` (how many particles the weights are worth), ``cbo/lost`` (candidates whose loss is not finite; they
    have no weight), and with particles ``cbo/diameter`` (largest distance to the consensus) and ``cbo/variance`` (mean
    square distance).

    Args:
        scheme: "cbo" or "hopping". Hopping takes ``sigma`` as the standard deviation of its candidates, and has no use
            for ``dt``, ``lam``, ``noise``, ``particle_batch``, ``update``, ``stagnation_tol`` and ``init``.
        n_particles: N, on all ranks together.
        particle_batch: Particles from which a consensus is made; None for all. N / particle_batch moves are a step.
        update: Whether a batch of particles moves all of them, or only itself.
        dt: Step of time.
        lam: Drift towards the consensus.
        sigma: Noise, in units of the distance to the consensus.
        alpha: Sharpness of the weights.
        noise: "anisotropic" scales each parameter by its own distance; "isotropic" only suits few parameters.
        alpha_schedule: "double_per_epoch" as the authors train networks; "ess" chooses alpha in every move so that the
            weights are worth half of the particles.
        sigma_schedule: "log2" divides sigma by ``log2(e + 2)`` after e epochs; "decay" multiplies it by 0.98 every
            100 steps.
        stagnation_tol: Where the consensus moved by less in every parameter, each particle gets additive noise
            ``sigma sqrt(dt)``, for particles that have met do not move otherwise. 0 for never.
        init: Whether particles begin around the module's parameters, or around 0.
        init_std: With this standard deviation.
        seed: Of all random numbers.
        vectorize: Whether particles are evaluated at once by ``torch.func.vmap``: "auto", "always" or "never".
        chunk: Particles evaluated at once; None lets the size of the intermediate results decide.
        ddp: What :class:`lightning.pytorch.strategies.DDPStrategy` takes, such as ``process_group_backend``.

    Raises:
        ValueError: If a value is out of range, and in training if no particle has a finite loss.
        MisconfigurationException: In ``setup``, for what has no meaning without gradients: gradient accumulation,
            clipping, ``precision="16-mixed"``, manual optimization; for BatchNorm with running statistics; when a
            checkpoint of another search is to be continued; and in the first step, for parameters without any effect
            on the loss.

    Cost:
        A step is N + 1 forward passes, over all ranks, and no backward pass; the first has 3 more a parameter tensor.
        N vectors as large as the model, over all ranks; with hopping none. Bytes a move: 8 a particle, and with
        particles 8 a parameter.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(strategy=CBOStrategy(n_particles=50), accelerator="cpu", devices=1, logger=False)
    """

    log_prefix: ClassVar[str] = "cbo"
    strategy_name = "cbo"

    def __init__(
        self,
        scheme: Scheme = "cbo",
        *,
        n_particles: int = 100,
        particle_batch: int | None = None,
        update: Literal["full", "partial"] = "full",
        dt: float = 0.1,
        lam: float = 1.0,
        sigma: float = math.sqrt(0.4),
        alpha: float = 50.0,
        noise: Noise = "anisotropic",
        alpha_schedule: AlphaSchedule = "constant",
        sigma_schedule: SigmaSchedule = "constant",
        stagnation_tol: float = 1e-5,
        init: Literal["around", "normal"] = "around",
        init_std: float = 1.0,
        seed: int = 0,
        vectorize: Vectorize = "auto",
        chunk: int | None = None,
        **ddp: Any,
    ) -> None:
        super().__init__(vectorize=vectorize, chunk=chunk, **ddp)
        self.settings = ConsensusSettings(
            scheme=scheme,
            n_particles=n_particles,
            particle_batch=particle_batch,
            update=update,
            dt=dt,
            lam=lam,
            sigma=sigma,
            alpha=alpha,
            noise=noise,
            alpha_schedule=alpha_schedule,
            sigma_schedule=sigma_schedule,
            stagnation_tol=stagnation_tol,
            init=init,
            init_std=init_std,
            seed=seed,
        )
        self._warned_of_lost = False
        self._first_epoch = 0

    def start(self, point: Tensor) -> None:
        """Draw the particles of this rank."""
        own = self.own_part(self.settings.n_particles)
        self.swarm = Swarm(self.settings, point, own, self.gather, self.sum_over_ranks)
        self._first_epoch = self._trainer.current_epoch
        self._warned_of_lost = False

    def search(self) -> tuple[Tensor, dict[str, float]]:
        """Evaluate the particles, find the consensus, move."""
        if self.swarm.steps == 0:
            self._refuse_unused()
        logs = is_log_step(self._trainer)
        self.swarm.step(self.evaluate, epoch=self._trainer.current_epoch - self._first_epoch)
        values = self.swarm.statistics
        if values["lost"] and not self._warned_of_lost:
            self._warned_of_lost = True
            rank_zero_warn(
                f"CBOStrategy: {values['lost']:.0f} of {self.settings.n_particles} candidates had a loss that is not"
                " finite; they have no weight. cbo/lost counts them."
            )
        names = ("best_loss", "alpha", "sigma", "ess", "lost")
        spread = self.swarm.spread() if logs else {}
        return self.swarm.consensus, {**{name: values[name] for name in names}, **spread} if logs else {}

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _refuse_unused(self) -> None:
        """Particles have no reason to agree about parameters that the loss does not depend on: those would drift.

        There need not be a gradient to tell them by, so each tensor is changed by itself, from a point that is not the
        start, where a layer of zeros may hide those before it.
        """
        generator = torch.Generator(self.flat.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.flat.dtype, device=self.flat.device)

        scales = 10.0 ** torch.arange(-1, 2)
        base = self.swarm.consensus + normal(self.flat.dimension)
        unused = []
        at_base = self.evaluate(base[None])
        for name in self.flat.named:
            changed = base.repeat(len(scales), 1)
            part = self.flat.views(changed)[name]
            part += scales.to(part).reshape(-1, *[1] * (part.ndim - 1)) * normal(*part.shape)
            losses = self.evaluate(changed)
            if ((losses == at_base) | ~losses.isfinite()).all() and at_base.isfinite():
                unused.append(name)
        if unused:
            raise MisconfigurationException(
                f"CBOStrategy: the loss does not change with {', '.join(unused)}, which are not used: particles would"
                " drift there. Freeze them, or leave them out of the optimizer."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """At the consensus."""
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is not None and self.lightning_module is not None:
            self.lightning_module.log("cbo/consensus_loss", loss.detach().float(), on_step=True, on_epoch=False)
        return output

    def search_state(self) -> dict[str, Any]:
        """The particles of this rank, and what all ranks have alike."""
        swarm = self.swarm
        return {
            "scheme": self.settings.scheme,
            "n_particles": self.settings.n_particles,
            "particles": swarm.particles,
            "consensus": swarm.consensus,
            "steps": swarm.steps,
            "moves": swarm.moves,
            "first_epoch": self._first_epoch,
        }

    def load_search_state(self, states: list[dict[str, Any]]) -> None:
        """Share the particles out over the ranks of this run."""
        first, swarm = states[0], self.swarm
        saved = {
            "scheme": first["scheme"],
            "n_particles": first["n_particles"],
            "parameters": len(first["consensus"]),
        }
        ours = {
            "scheme": self.settings.scheme,
            "n_particles": self.settings.n_particles,
            "parameters": len(swarm.consensus),
        }
        if saved != ours:
            raise MisconfigurationException(
                f"CBOStrategy cannot continue the search of the checkpoint, which has {saved}; this one has {ours}."
            )
        swarm.consensus, swarm.steps, swarm.moves = first["consensus"], first["steps"], first["moves"]
        self._first_epoch = first["first_epoch"]
        particles = torch.cat([state["particles"] for state in states])
        if self.settings.scheme == "cbo":
            swarm.particles = particles[swarm.own.start : swarm.own.stop].clone()
