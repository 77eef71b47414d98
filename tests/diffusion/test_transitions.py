from __future__ import annotations

from itertools import combinations

import pytest
import torch

from ddpo.diffusion import Transition
from ddpo.diffusion.ddim import Ddim
from ddpo.errors import ConfigError, ModelError
from ddpo.models.schedule import NoiseSchedule
from tests.checks import (
    check_log_probs_are_golden,
    ddim,
    ddim_reference,
    stable_diffusion_scheduler,
)

STEPS = 10
PREDICTIONS = ["epsilon", "v_prediction"]


ALL = torch.arange(STEPS)


def process_of(
    *, eta: float = 1.0, prediction_type: str = "epsilon", set_alpha_to_one: bool = False
) -> Ddim:
    scheduler = stable_diffusion_scheduler(
        prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one
    )
    return ddim(scheduler, steps=STEPS, eta=eta)


def tensors(count: int = STEPS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, model output and noise [count, 4, 8, 8]."""
    source = torch.Generator().manual_seed(seed)
    latents, output, noise = torch.randn((3, count, 4, 8, 8), generator=source)
    return latents, output, noise


def test_log_probs_are_those_of_an_independent_implementation() -> None:
    check_log_probs_are_golden()


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_mean_and_std_are_ddims_formulas(
    prediction_type: str, eta: float, set_alpha_to_one: bool
) -> None:
    process = process_of(
        eta=eta, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    latents, output, _ = (value.double() for value in tensors())
    assert process.times.tolist() == [901 - 100 * step for step in range(STEPS)]
    found = process.transition(ALL, output, latents)
    for row, timestep in enumerate(int(time) for time in process.times):
        mean, std = ddim_reference(
            alphas,
            timestep,
            timestep - 100,
            latents[row],
            output[row],
            eta=eta,
            prediction_type=prediction_type,
            final_alpha=1.0 if set_alpha_to_one else float(alphas[0]),
        )
        # The schedule's alphas are float32, as diffusers has them.
        torch.testing.assert_close(found.mean[row], mean, rtol=0, atol=2e-5)
        assert float(found.std[row]) == pytest.approx(std, abs=2e-6)


def test_with_eta_1_a_step_is_ddpms_posterior() -> None:
    """DDPM's formula 7 (arXiv 2006.11239), which shares no term with DDIM's formula 12."""
    process = process_of(eta=1.0)
    latents, output, _ = (value.double() for value in tensors())
    found = process.transition(ALL, output, latents)
    alphas = process.schedule.alphas_cumprod.double()
    for row, timestep in enumerate(int(time) for time in process.times):
        a_t = alphas[timestep]
        a_p = alphas[timestep - 100] if timestep >= 100 else alphas[0]
        beta = 1 - a_t / a_p
        clean = (latents[row] - (1 - a_t).sqrt() * output[row]) / a_t.sqrt()
        mean = (
            a_p.sqrt() * beta / (1 - a_t) * clean
            + (a_t / a_p).sqrt() * (1 - a_p) / (1 - a_t) * latents[row]
        )
        torch.testing.assert_close(found.mean[row], mean, rtol=0, atol=2e-5)
        variance = float((1 - a_p) / (1 - a_t) * beta)
        assert float(found.std[row]) ** 2 == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_draw_is_plain_diffusers_step_to_the_bit(
    prediction_type: str, eta: float, set_alpha_to_one: bool
) -> None:
    scheduler = stable_diffusion_scheduler(
        prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one
    )
    process = ddim(scheduler, steps=STEPS, eta=eta)
    scheduler.set_timesteps(STEPS)
    latents, output, noise = tensors(3)
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
        found = process.transition(torch.full((3,), step), output, latents).draw(noise)
        assert torch.equal(found, expected.prev_sample), f"timestep {timestep}"


def test_pairs_of_several_steps_share_a_batch() -> None:
    process = process_of()
    latents, output, noise = tensors()
    together = process.transition(ALL, output, latents)
    for row in range(STEPS):
        one = slice(row, row + 1)
        alone = process.transition(ALL[one], output[one], latents[one])
        assert torch.equal(together.draw(noise)[one], alone.draw(noise[one]))
        assert torch.equal(together.log_prob(noise)[one], alone.log_prob(noise[one]))


def test_log_density_is_the_normals_averaged_over_latent_dimensions() -> None:
    source = torch.Generator().manual_seed(0)
    mean, value = torch.randn((2, 5, 4, 8, 8), generator=source, dtype=torch.float64)
    std = torch.rand((5, 1, 1, 1), generator=source, dtype=torch.float64) + 0.01
    expected = torch.distributions.Normal(mean, std).log_prob(value).mean(dim=(1, 2, 3))
    torch.testing.assert_close(Transition(mean, std).log_prob(value), expected)


def test_log_density_has_a_gradient_in_the_mean_only() -> None:
    mean = torch.zeros(2, 4, 8, 8, requires_grad=True)
    value = torch.randn(2, 4, 8, 8, requires_grad=True)
    Transition(mean, torch.full((2, 1, 1, 1), 0.5)).log_prob(value).sum().backward()
    assert mean.grad is not None and value.grad is None
    torch.testing.assert_close(mean.grad, value.detach() / 0.25 / (4 * 8 * 8))


@pytest.mark.parametrize(
    ("eta", "set_alpha_to_one", "deterministic"),
    [(0.0, False, range(STEPS)), (1.0, True, [STEPS - 1]), (0.3, True, [STEPS - 1])],
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_step_without_variance_has_no_log_prob_and_no_gradient(
    prediction_type: str, eta: float, set_alpha_to_one: bool, deterministic: list[int]
) -> None:
    process = process_of(
        eta=eta, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one
    )
    rows = list(deterministic)
    expected = [step not in rows for step in range(STEPS)]
    assert process.stochastic().tolist() == expected

    latents, output, noise = tensors()
    output.requires_grad_()
    transition = process.transition(ALL, output, latents)
    log_probs = transition.log_prob(transition.draw(noise))
    log_probs.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(log_probs).all() and torch.isfinite(output.grad).all()
    assert (log_probs[rows] == 0).all() and (output.grad[rows] == 0).all()
    others = [step for step in range(STEPS) if step not in rows]
    assert (log_probs[others] != 0).all()
    assert output.grad[others].abs().sum(dim=(1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_zero_terminal_snr_is_finite_at_every_number_of_steps(spacing: str, eta: float) -> None:
    """The first step starts from pure noise: rounding takes 1 - alpha - std² to -6e-8, not 0."""
    scheduler = stable_diffusion_scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing
    )
    bad = []
    for steps in range(1, 101):
        process = ddim(scheduler, steps=steps, eta=eta)
        latents, output, noise = torch.ones((3, steps, 1, 2, 2))
        found = process.transition(torch.arange(steps), output, latents)
        drawn = found.draw(noise)
        if not (drawn.isfinite().all() and found.log_prob(drawn).isfinite().all()):
            bad.append(steps)
    assert not bad


def test_a_model_that_predicts_noise_is_refused_where_its_input_is_nothing_else() -> None:
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    with pytest.raises(ModelError, match=r"at timestep 999 .*Expected a model that predicts v"):
        ddim(stable_diffusion_scheduler(**settings, timestep_spacing="trailing"), steps=STEPS)
    process = ddim(stable_diffusion_scheduler(**settings), steps=STEPS)
    latents, output, _ = tensors()
    assert process.transition(ALL, output, latents).mean.isfinite().all()


def test_every_step_of_stable_diffusion_is_stochastic() -> None:
    assert process_of().stochastic().all()


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"thresholding": True}])
def test_a_scheduler_that_clips_is_refused(change: dict[str, bool]) -> None:
    with pytest.raises(ModelError, match="clips its predictions"):
        NoiseSchedule.from_scheduler(stable_diffusion_scheduler(**change).config)


def test_a_scheduler_that_predicts_the_sample_is_refused() -> None:
    scheduler = stable_diffusion_scheduler(prediction_type="sample")
    with pytest.raises(ModelError, match=r"'sample'.*expected 'epsilon' or 'v_prediction'"):
        NoiseSchedule.from_scheduler(scheduler.config)


# Times, noising, ranks


@pytest.mark.parametrize("steps", [1, 7, 10, 20, 50, 333, 999])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_steps_are_placed_where_diffusers_places_them(spacing: str, steps: int) -> None:
    scheduler = stable_diffusion_scheduler(timestep_spacing=spacing)
    process = ddim(scheduler, steps=steps, eta=1.0)
    scheduler.set_timesteps(steps)
    assert process.times.tolist() == scheduler.timesteps.tolist()
    assert process.steps == steps and process.times.dtype == torch.float32


@pytest.mark.parametrize(("spacing", "largest"), [("leading", 999), ("trailing", 1000)])
def test_more_steps_than_the_model_was_trained_with_are_refused(spacing: str, largest: int) -> None:
    scheduler = stable_diffusion_scheduler(timestep_spacing=spacing)
    assert ddim(scheduler, steps=largest, eta=1.0).steps == largest
    with pytest.raises(ConfigError, match=f"sampler.steps is {largest + 1}.*at most {largest}"):
        ddim(scheduler, steps=largest + 1, eta=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_noised_latents_and_targets_are_diffusers_to_the_bit(
    prediction_type: str, dtype: torch.dtype
) -> None:
    scheduler = stable_diffusion_scheduler(prediction_type=prediction_type)
    clean, noise, _ = (value.to(dtype) for value in tensors())
    timesteps = torch.randint(1000, (STEPS,), generator=torch.Generator().manual_seed(1))
    noisy, target = ddim(scheduler, steps=STEPS).schedule.noised(clean, noise, timesteps.float())
    assert torch.equal(noisy, scheduler.add_noise(clean, noise, timesteps))
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    assert torch.equal(target, noise if prediction_type == "epsilon" else velocity)


@pytest.mark.parametrize("shape", [(16,), (4, 3, 8, 8)])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_latents_may_have_any_rank(prediction_type: str, shape: tuple[int, ...]) -> None:
    process = process_of(prediction_type=prediction_type)
    source = torch.Generator().manual_seed(0)
    latents, output, noise = torch.randn((3, STEPS, *shape), generator=source)
    steps, times = ALL, torch.arange(STEPS).float()
    found = process.transition(steps, output, latents)
    noisy, target = process.schedule.noised(latents, noise, times)
    flat = [value.reshape(STEPS, -1, 1, 1) for value in (latents, output, noise)]
    expected = process.transition(steps, flat[1], flat[0])
    assert found.draw(noise).shape == (STEPS, *shape)
    assert torch.equal(found.draw(noise).flatten(1), expected.draw(flat[2]).flatten(1))
    torch.testing.assert_close(found.log_prob(noise), expected.log_prob(flat[2]))
    for value, other in zip(
        (noisy, target), process.schedule.noised(flat[0], flat[2], times), strict=True
    ):
        assert torch.equal(value.flatten(1), other.flatten(1))


def test_a_process_says_what_makes_it_another() -> None:
    processes = [
        process_of(),
        process_of(eta=0.5),
        process_of(prediction_type="v_prediction"),
        process_of(set_alpha_to_one=True),
        ddim(stable_diffusion_scheduler(), steps=STEPS + 1),
    ]
    identities = [process.identity() for process in processes]
    assert all(one != other for one, other in combinations(identities, 2))
    assert process_of().identity() == identities[0]
