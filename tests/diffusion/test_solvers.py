"""Multistep solvers: plain diffusers draws the same, and what is asked of them reaches it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor

from ddpo.analysis.evaluation.proof import Job, prove
from ddpo.config import RunConfig, SolverSampler
from ddpo.diffusion import PROCESSES, PlainScheduler, Process
from ddpo.diffusion.sampling import sample, sampler_digest
from ddpo.diffusion.window import process_of
from ddpo.errors import ConfigError, ModelError
from ddpo.models import Policy
from ddpo.models.flow_schedule import FlowSchedule
from ddpo.models.schedule import NoiseSchedule, Schedule
from ddpo.runs.start import check_denoising
from tests.configs import parse
from tests.tiny import PROMPTS, SCHEDULE, build_tiny_model, grow_adapter, load_policy, tiny_config
from tests.tiny_families import FAMILIES, SETTINGS, plain_latents

SOLVERS = {"dpm_solver": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
BUILD = {
    "sd": build_tiny_model,
    "v": partial(build_tiny_model, prediction_type="v_prediction", seed=1),
    **FAMILIES,
}
NFT = {"type": "nft", "updates_per_epoch": 2, "advantages": {"type": "batch"}}
SEEDS = (11, 22, 33, 44)

# What a user of diffusers sets to run a solver on Stable Diffusion 3 or FLUX.
OF_FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTS = {"sd3": {**OF_FLOWS, "flow_shift": 3.0}, "flux": OF_FLOWS, "flux2": OF_FLOWS}

each_solver = pytest.mark.parametrize("kind", SOLVERS)


class Models:
    """Tiny pipelines of each family, built and loaded when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._policies: dict[str, Policy] = {}

    def path(self, name: str) -> Path:
        path = self.folder / name
        return path if path.exists() else BUILD[name](path)

    def config(self, name: str, **sampler: Any) -> RunConfig:
        own = {part: dict(value) for part, value in SETTINGS.get(name, {}).items()}
        own["sampler"] = {"steps": 6, "guidance_scale": 3.0, **sampler}
        return tiny_config(self.path(name), algorithm=dict(NFT), **own)

    def policy(self, name: str) -> Policy:
        if name not in self._policies:
            self._policies[name] = load_policy(self.config(name, type="unipc"))
            grow_adapter(self._policies[name])
        return self._policies[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("solved"))


def own_scheduler(folder: Path) -> Any:
    """Return a pipeline's scheduler as diffusers loads it."""
    _, kind = json.loads((folder / "model_index.json").read_text())["scheduler"]
    return getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")


@each_solver
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", BUILD)
def test_final_latents_are_those_of_the_pipelines_own_call_to_the_bit(
    models: Models, name: str, guidance: float, kind: str
) -> None:
    sampler = models.config(name, type=kind, guidance_scale=guidance).sampler
    policy = models.policy(name)
    drawn = sample(policy, ["two cats"], [5], sampler)
    settings = {"solver_order": 2, **SHIFTS.get(name, {})}
    scheduler = SOLVERS[kind].from_config(own_scheduler(models.path(name)).config, **settings)
    theirs = plain_latents(policy, "two cats", scheduler, **sampler.pipeline_arguments)
    assert torch.equal(drawn.latents[:, -1], theirs)
    assert drawn.times.tolist() == scheduler.timesteps.tolist()
    assert not drawn.log_probs.any() and drawn.log_prob_mean(0) is None
    lower = sample(policy, ["two cats"], [5], sampler.changed(order=1)).latents[:, -1]
    assert not torch.allclose(lower, theirs, atol=1e-3)


@each_solver
def test_a_stochastic_solver_of_the_models_file_is_made_one_without_noise(kind: str) -> None:
    """And one whose last step would be NaN is made another."""
    bad = {"dpm_solver": {"algorithm_type": "sde-dpmsolver++"}, "unipc": {"solver_type": "bh1"}}
    process = solver(kind, NoiseSchedule.from_scheduler({**SCHEDULE, **bad[kind]}), steps=4)
    latents = torch.randn(2, 4, 3, 3)
    runs = [walk(process, latents, lambda given, _: 0 * given) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].isfinite().all()


@each_solver
@pytest.mark.parametrize("written", [{}, {"timestep_spacing": "leading"}])
def test_what_the_models_file_leaves_out_has_the_solvers_own_default(
    kind: str, written: dict[str, str]
) -> None:
    """As for a user of diffusers: a spacing that only PNDM's default says is not passed on."""
    kept = {name: value for name, value in SCHEDULE.items() if name != "clip_sample"}
    own: Any = PNDMScheduler.from_config({**kept, **written})
    process = solver(kind, NoiseSchedule.from_scheduler(own.config), steps=8)
    expected = SOLVERS[kind].from_config(own.config)
    expected.set_timesteps(8)
    assert process.times.tolist() == expected.timesteps.tolist()
    assert process.times[0] == (889 if written else 999)


@each_solver
def test_a_sample_depends_on_its_own_seed_alone(models: Models, kind: str) -> None:
    """On no other sample of its batch, and on no batch before it."""
    policy, sampler = models.policy("sd"), models.config("sd", type=kind).sampler
    first = sample(policy, PROMPTS[:4], SEEDS, sampler)
    again = sample(policy, PROMPTS[:4], SEEDS, sampler)
    assert torch.equal(first.latents, again.latents)
    assert [each.tobytes() for each in first.images] == [each.tobytes() for each in again.images]
    turned = sample(policy, PROMPTS[3::-1], SEEDS[::-1], sampler)
    assert torch.equal(turned.latents.flip(0), first.latents)
    behind = sample(policy, [*PROMPTS[2:6], *PROMPTS[:4]], [1, 2, 3, 4, *SEEDS], sampler)
    assert torch.equal(behind.latents[4:], first.latents)


def test_solver_order_and_steps_are_part_of_the_digest(models: Models) -> None:
    policy = models.policy("sd")
    sampler = models.config("sd", type="dpm_solver").sampler
    assert isinstance(sampler, SolverSampler) and sampler.order == 2
    others = [
        sampler.changed(order=1),
        sampler.changed(order=3),
        sampler.changed(steps=7),
        sampler.changed(guidance_scale=1.0),
        models.config("sd", type="unipc").sampler,
        models.config("sd", type="ddim", eta=0.0).sampler,
    ]
    digests = [sampler_digest(policy, each) for each in (sampler, *others)]
    assert len(set(digests)) == len(digests)
    assert sampler_digest(policy, models.config("sd", type="dpm_solver").sampler) == digests[0]


def test_settings_of_the_models_own_scheduler_that_a_solver_reads_are_part_of_its_identity() -> (
    None
):
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"use_karras_sigmas": True},
        {"timestep_spacing": "trailing"},
        {"beta_end": 0.02},
    )
    identities = [
        json.dumps(
            solver("dpm_solver", NoiseSchedule.from_scheduler({**SCHEDULE, **each})).identity()
        )
        for each in changes
    ]
    assert len(set(identities)) == len(changes)
    ignored = NoiseSchedule.from_scheduler({**SCHEDULE, "skip_prk_steps": True})
    assert json.dumps(solver("dpm_solver", ignored).identity()) == identities[0]


# Settings


@each_solver
@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf"])
def test_a_policy_gradient_is_refused(kind: str, algorithm: str) -> None:
    expected = f"sampler.type is {kind}: every step is then deterministic, has no log-prob"
    with pytest.raises(ConfigError, match=expected):
        parse(sampler={"type": kind}, algorithm={"type": algorithm})


@each_solver
@pytest.mark.parametrize("algorithm", ["rwr", "rwr_sparse", "nft", "awm", "dpo"])
def test_what_trains_on_final_latents_takes_solvers(kind: str, algorithm: str) -> None:
    rollouts = {"samples_per_prompt": 4}
    config = parse(sampler={"type": kind}, algorithm={"type": algorithm}, rollouts=rollouts)
    assert config.sampler.changed(order=3).summary == f"20 steps of {kind} of order 3, guidance 5.0"
    with pytest.raises(ConfigError, match=r"sampler.order.*less than or equal to 3"):
        parse(sampler={"type": kind, "order": 4}, algorithm={"type": "rwr"})


def test_evaluations_use_the_solver_and_have_no_eta(models: Models) -> None:
    sampler = models.config("sd", type="unipc", order=3).sampler
    assert sampler.at_inference(0.0) == sampler
    config = models.config("sd", type="unipc").changed(evaluation={"eta": 0.5})
    with pytest.raises(ConfigError, match=r"evaluation: eta is 0\.5, and sampler\.type is unipc"):
        check_denoising(config)


@each_solver
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_more_steps_than_the_schedule_has_are_refused(kind: str, spacing: str) -> None:
    schedule = NoiseSchedule.from_scheduler({**SCHEDULE, "timestep_spacing": spacing})
    with pytest.raises(ConfigError, match=r"sampler\.steps is 1000, more than the model's 1000"):
        solver(kind, schedule, steps=1000)
    with pytest.raises(ConfigError, match=r"sampler\.steps is 1001"):
        solver(kind, FlowSchedule.from_scheduler({}, 2, (16, 8, 8)), steps=1001)


@each_solver
def test_what_a_solver_would_misread_is_refused(kind: str) -> None:
    for change in ({"use_karras_sigmas": True}, {"shift_terminal": 0.1}):
        schedule = FlowSchedule.from_scheduler(change, 2, (16, 8, 8))
        with pytest.raises(ConfigError, match=f"sets {next(iter(change))}, which .* to ode"):
            solver(kind, schedule)
    pure = {**SCHEDULE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ModelError, match=r"at timestep 999 .*Expected a model that predicts v"):
        solver(kind, NoiseSchedule.from_scheduler(pure))


# Order of convergence, where the flow from noise to data is known


def solver(kind: str, schedule: Schedule, **settings: Any) -> Process:
    given = {"type": kind, "steps": 10, **settings}
    config = tiny_config("model", sampler=given, algorithm=dict(NFT))
    return PROCESSES[kind](schedule, config.sampler, torch.device("cpu"))


def walk(process: Process, latents: Tensor, outputs: Any, steps: int | None = None) -> Tensor:
    """Take some steps, by default all, with predictions made from latents and time."""
    step = process.stepper()
    for number, time in enumerate(process.times.tolist()[:steps]):
        latents, _ = step(number, outputs(latents, time), latents, torch.zeros_like(latents))
    return latents


MEAN, SPREAD = 0.7, 0.4


def parts_at(schedule: Schedule, time: float) -> tuple[Tensor, Tensor]:
    """Return the factors of image and noise at a time, in float64."""
    if isinstance(schedule, NoiseSchedule):
        alpha = schedule.alphas_cumprod[int(time)].double()
        return alpha.sqrt(), (1 - alpha).sqrt()
    sigma = torch.tensor(time / 1000, dtype=torch.float64)
    return 1 - sigma, sigma


def error(kind: str, schedule: Schedule, order: int, steps: int) -> float:
    """Return the distance from the flow after 3/4 of the steps, if data are Normal(0.7, 0.4²).

    The flow without noise keeps each latent at its quantile.
    """
    process = solver(kind, schedule, order=order, steps=steps)

    def marginal(time: float) -> tuple[Tensor, Tensor]:
        image, noise = parts_at(schedule, time)
        return image * MEAN, ((image * SPREAD) ** 2 + noise**2).sqrt()

    def predict(latents: Tensor, time: float) -> Tensor:
        (mean, std), (image, noise) = marginal(time), parts_at(schedule, time)
        score = (latents - mean) / std**2
        if isinstance(schedule, NoiseSchedule):
            return noise * score
        return noise * score - (MEAN + SPREAD**2 * image * score)

    quantiles = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    taken = 3 * steps // 4
    (mean, std), (last_mean, last_std) = (
        marginal(float(process.times[number])) for number in (0, taken)
    )
    found = walk(process, mean + std * quantiles, predict, taken)
    return float((found - (last_mean + last_std * quantiles)).abs().max())


@each_solver
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.from_scheduler(SCHEDULE),
        FlowSchedule.from_scheduler({"shift": 3.0}, 2, (16, 8, 8)),
    ],
    ids=["diffusion", "flow"],
)
def test_order_2_is_closer_to_the_flow_than_order_1_at_equal_steps(
    schedule: Schedule, kind: str
) -> None:
    for steps in (16, 32):
        first, second = (error(kind, schedule, order, steps) for order in (1, 2))
        assert second < 0.5 * first


# Plain diffusers, in a fresh process


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("sd", "dpm_solver"), ("sd3", "unipc")])
def test_plain_diffusers_draws_the_same_pictures_with_the_named_scheduler(
    models: Models, tmp_path: Path, name: str, kind: str
) -> None:
    policy, sampler = models.policy(name), models.config(name, type=kind).sampler
    policy.export(tmp_path / "lora")
    expected = sample(policy, ["a cat"] * 2, [1, 2], sampler).images
    width, height = policy.size

    def draws_alike(scheduler: PlainScheduler | None) -> bool:
        job = Job(
            pipeline=str(models.path(name)),
            variant=None,
            lora=str(tmp_path / "lora"),
            device="cpu",
            threads=1,
            prompts=["a cat"] * 2,
            seeds=[1, 2],
            arguments={
                **sampler.at_inference(0.0).pipeline_arguments,
                **policy.pipeline_arguments,
                "width": width,
                "height": height,
            },
            scheduler=scheduler,
        )
        try:
            return prove(job, expected, tmp_path, dtype="float32") < 0.1
        except ModelError:
            return False

    plain = process_of(policy, sampler).plain_scheduler
    assert plain is not None and draws_alike(plain) and not draws_alike(None)
