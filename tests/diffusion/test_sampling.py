from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from ddpo.config import DdimSampler
from ddpo.diffusion.sampling import Trajectories, sample, sampler_digest
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    flat,
    grow_adapter,
    load_policy,
    tiny_config,
)

SAMPLER = DdimSampler(steps=4, guidance_scale=3.0, eta=1.0)
SEEDS = (11, 22, 33, 44)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    policy = load_policy(tiny_config(tiny_model))
    grow_adapter(policy)
    return policy


@pytest.fixture(scope="module")
def v_policy(tiny_v_model: Path) -> Policy:
    policy = load_policy(tiny_config(tiny_v_model))
    grow_adapter(policy)
    return policy


def draw(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], batch: int = 4, **sampler: float
) -> Trajectories:
    policy.numerics = policy.numerics.model_copy(update={"sample_batch_size": batch})
    return sample(policy, prompts, seeds, SAMPLER.model_copy(update=sampler))


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_trajectories_run_from_the_seeds_noise_to_the_picture(policy: Policy) -> None:
    drawn = draw(policy, PROMPTS[:4], SEEDS)
    assert drawn.latents.shape == (4, 5, 4, 8, 8) and drawn.latents.dtype == torch.float32
    assert drawn.log_probs.shape == (4, 4) and drawn.log_probs.dtype == torch.float32
    assert drawn.times.tolist() == [751, 501, 251, 1] and drawn.times.dtype == torch.float32
    for row, seed in enumerate(SEEDS):
        noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn.latents[row, 0], noise)
    assert np.array_equal(pixels(drawn.images), pixels(policy.decode(drawn.latents[:, -1])))
    assert [image.size for image in drawn.images] == [(16, 16)] * 4
    assert 10 < pixels(drawn.images).std() < 90  # neither flat nor black and white


def test_a_sample_does_not_depend_on_its_neighbours_or_place(policy: Policy) -> None:
    first = draw(policy, PROMPTS[:4], SEEDS)
    other = draw(policy, ["a bee", "a fox", PROMPTS[1], PROMPTS[0]], [5, 6, SEEDS[1], SEEDS[0]])
    assert torch.equal(first.latents[0], other.latents[3])
    assert torch.equal(first.latents[1], other.latents[2])
    assert torch.equal(first.log_probs[0], other.log_probs[3])
    assert np.array_equal(pixels(first.images[:1]), pixels(other.images[3:]))


def test_a_sample_depends_on_its_seed_and_its_prompt(policy: Policy) -> None:
    drawn = draw(policy, ["a cat", "a cat", "a dog", "a cat"], [1, 2, 1, 1])
    assert torch.equal(drawn.latents[0], drawn.latents[3])
    assert not torch.allclose(drawn.latents[0, -1], drawn.latents[1, -1], atol=0.1)
    assert torch.equal(drawn.latents[0, 0], drawn.latents[2, 0])
    assert not torch.allclose(drawn.latents[0, -1], drawn.latents[2, -1], atol=1e-3)


def test_other_starts_leave_the_noise_of_steps_as_it_is(policy: Policy) -> None:
    """Of a seed's numbers the first make the start, whether or not it is used."""
    own = draw(policy, PROMPTS[:4], SEEDS)
    same = sample(policy, PROMPTS[:4], SEEDS, SAMPLER, starts=SEEDS)
    assert torch.equal(own.latents, same.latents)
    shared = sample(policy, PROMPTS[:4], SEEDS, SAMPLER, starts=[SEEDS[0]] * 4)
    assert torch.equal(own.latents[0], shared.latents[0])
    assert torch.equal(shared.latents[:, 0], own.latents[:1, 0].expand(4, -1, -1, -1))
    assert not torch.equal(own.latents[1, 1], shared.latents[1, 1])


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_sizes_change_no_more_than_rounding(policy: Policy, batch: int) -> None:
    by_four = draw(policy, PROMPTS[:4], SEEDS)
    other = draw(policy, PROMPTS[:4], SEEDS, batch=batch)
    rounding = 1e-5 * float(by_four.latents.abs().max())
    torch.testing.assert_close(other.latents, by_four.latents, rtol=0, atol=rounding)
    torch.testing.assert_close(other.log_probs, by_four.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "eta", "guidance"),
    [
        ("epsilon", 0.0, 3.0),
        ("epsilon", 0.0, 1.0),
        ("epsilon", 1.0, 3.0),
        ("v_prediction", 0.0, 3.0),
        ("v_prediction", 1.0, 3.0),
    ],
)
def test_pictures_are_plain_diffusers_to_the_byte(
    tiny_model: Path, tiny_v_model: Path, kind: str, eta: float, guidance: float
) -> None:
    folder = tiny_model if kind == "epsilon" else tiny_v_model
    policy = load_policy(tiny_config(folder))
    prompts, seeds = ["a cat"] * 3, SEEDS[:3]
    ours = draw(policy, prompts, seeds, eta=eta, guidance_scale=guidance)

    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        prompts,
        num_inference_steps=4,
        guidance_scale=guidance,
        eta=eta,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    assert plain.scheduler.config.prediction_type == kind
    assert np.array_equal(pixels(ours.images), pixels(theirs))


def test_stored_latents_reproduce_stored_log_probs(policy: Policy, v_policy: Policy) -> None:
    for each in (policy, v_policy):
        drawn = draw(each, PROMPTS[:4], SEEDS)
        config = tiny_config(each.folder)
        each.numerics = each.numerics.model_copy(update={"micro_batch_size": 4})
        gradient = TrajectoryGradient(each, config.sampler, config.algorithm)
        rollouts = Rollouts(PROMPTS[:4], drawn.latents, drawn.log_probs)
        assert torch.equal(gradient.recompute(rollouts, range(4)), drawn.log_probs)
        assert drawn.log_probs.std() > 0.1


def test_deterministic_sampling_has_no_log_probs(policy: Policy) -> None:
    drawn = draw(policy, PROMPTS[:4], SEEDS, eta=0.0)
    assert (drawn.log_probs == 0).all()
    assert torch.equal(drawn.latents, draw(policy, PROMPTS[:4], SEEDS, eta=0.0).latents)


def test_guidance_1_is_the_conditional_prediction_alone(policy: Policy) -> None:
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([501.0, 501.0])
    text, empty = policy.encode(["a cat", "a dog"]), policy.encode(["", ""])
    with torch.no_grad():
        # As plain diffusers calls it, with a timestep that is an integer.
        conditional = policy.pipeline.unet(latents, 501, text["text"]).sample
        without = policy.pipeline.unet(latents, 501, empty["text"]).sample
        assert torch.equal(policy.predict(latents, times, text, 1.0), conditional)
        for scale in (2.0, 7.5):
            found = policy.predict(latents, times, text, scale)
            expected = without + scale * (conditional - without)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert (found - conditional).abs().max() > 1e-2


def test_guidance_changes_what_is_drawn(policy: Policy) -> None:
    plain = draw(policy, PROMPTS[:4], SEEDS, guidance_scale=1.0)
    guided = draw(policy, PROMPTS[:4], SEEDS, guidance_scale=5.0)
    assert (plain.latents[:, -1] - guided.latents[:, -1]).abs().max() > 1e-2


def test_non_finite_weights_stop_sampling_by_name(tiny_model: Path) -> None:
    policy = load_policy(tiny_config(tiny_model))
    with torch.no_grad():
        policy.pipeline.unet.conv_out.bias[0] = torch.nan
    with (
        pytest.warns(RuntimeWarning, match="invalid value"),  # pictures of NaN
        pytest.raises(NonFiniteError, match=r"'a cat' at step 0 \(time 751\)"),
    ):
        draw(policy, PROMPTS[:4], SEEDS)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (0, r"Nothing has been trained yet \(checkpoint 0\), so this is the base model.*float32"),
        (12, r"The weights have diverged\. Fork the run.*lower optimizer\.learning_rate"),
        (None, r"The weights have diverged"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_error_tells_a_base_model_from_weights_that_diverged(
    tiny_model: Path, updates: int | None, message: str
) -> None:
    policy = load_policy(tiny_config(tiny_model))
    with torch.no_grad():
        policy.pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=message):
        sample(policy, PROMPTS[:4], SEEDS, SAMPLER, updates=updates)


def test_the_error_names_the_sample_and_step_that_went_wrong_first(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = policy.predict

    def overflow(latents: torch.Tensor, times: torch.Tensor, *rest: object) -> torch.Tensor:
        output = predict(latents, times, *rest)
        if int(times[0]) == 251:
            output[2, 0, 0, 0] = torch.inf
        return output

    monkeypatch.setattr(policy, "predict", overflow)
    monkeypatch.setattr(policy, "decode", lambda latents: [])
    with pytest.raises(NonFiniteError, match=r"'a horse' at step 2 \(time 251\)"):
        draw(policy, PROMPTS[:4], SEEDS)


def test_images_need_not_be_square(tiny_model: Path) -> None:
    """Width and height keep their order from the config to the pixels, and an update trains."""
    config = tiny_config(tiny_model, model={"resolution": [32, 16]})
    policy = load_policy(config)
    assert policy.size == (32, 16) and policy.latent_shape == (4, 8, 16)
    prompts = [PROMPTS[i % 4] for i in range(8)]
    drawn = sample(policy, prompts, list(range(8)), config.sampler)
    assert drawn.latents.shape == (8, 5, 4, 8, 16)
    assert [image.size for image in drawn.images] == [(32, 16)] * 8
    plain = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    theirs = plain(
        prompts[:4],
        width=32,
        height=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=seeds,
    ).images
    assert np.array_equal(pixels(drawn.images[:4]), pixels(theirs))
    before = initial_state(policy)
    after, metrics = update(
        policy,
        before,
        Rollouts(prompts, drawn.latents, drawn.log_probs),
        as_credit(alternating_advantages(8)),
        {},
        config,
    )
    assert metrics["initial_ratio_deviation"]["max"] == 0.0 and metrics["grad_norm"] > 0
    assert not torch.equal(flat(after.weights), flat(before.weights))


def test_a_sampler_digest_knows_width_and_height(policy: Policy, tiny_model: Path) -> None:
    sizes = [16, [16, 16], [32, 16], [16, 32]]
    digests = [
        sampler_digest(load_policy(tiny_config(tiny_model, model={"resolution": size})), SAMPLER)
        for size in sizes
    ]
    assert digests[0] == digests[1] == sampler_digest(policy, SAMPLER)
    assert len(set(digests)) == 3


def test_sampler_digest_tells_samplers_apart(policy: Policy, v_policy: Policy) -> None:
    digests = [
        sampler_digest(policy, SAMPLER),
        sampler_digest(v_policy, SAMPLER),
        *(
            sampler_digest(policy, SAMPLER.model_copy(update=change))
            for change in ({"steps": 5}, {"eta": 0.5}, {"guidance_scale": 3.5})
        ),
    ]
    assert len(set(digests)) == len(digests)
