"""The stages of training: pictures, autoencoder, latents, noise predictor."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo.randomness import derive_seed, generator
from ddpo.starter.glyphs import ANIMALS
from ddpo.starter.loop import Budget, console, fit, load_ema, one_core_each, replacing, write_json
from ddpo.starter.losses import KL_WEIGHT, kl_loss, min_snr_weight, noise_loss, picture_loss
from ddpo.starter.networks import Denoiser, build_scheduler, build_vae, decode, encode
from ddpo.starter.render import BACKGROUNDS, draw, draw_many
from ddpo.starter.text import article_prompt, build_tokenizer

DROPPED = 0.1
"""Share of pictures trained without a prompt, for classifier-free guidance."""

BARE = 0.3
"""Share of the other prompts that are 'cat' in place of 'a cat'."""

FRESH_PICTURES = 512
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights' bytes, on one machine.

    Attributes:
        seed: of every draw.
        cached_pictures: how many different pictures there are to train on.
        vae: the autoencoder's budget.
        unet: budget of noise predictor and text encoder.
        compile: whether torch.compile runs the noise predictor (other rounding, a third faster).
    """

    seed: int
    cached_pictures: int
    vae: Budget
    unet: Budget
    compile: bool

    def as_json(self) -> dict[str, Any]:
        """Returns the recipe as nested dictionaries."""
        return asdict(self)


class WorkFolder(NamedTuple):
    """Where the files of a training run lie."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe, as JSON."""
        return self.root / "recipe.json"

    @property
    def pictures(self) -> Path:
        """uint8 [N, 64, 64, 3]."""
        return self.root / "pictures.npy"

    @property
    def vae(self) -> Path:
        """Checkpoint of the autoencoder."""
        return self.root / "vae.safetensors"

    @property
    def vae_figures(self) -> Path:
        """Quality of the autoencoder on fresh pictures, as JSON."""
        return self.root / "vae.json"

    @property
    def latents(self) -> Path:
        """`latents` [N, 16, 8, 8], whitened, with `mean` and `std` [16] from before."""
        return self.root / "latents.safetensors"

    @property
    def unet(self) -> Path:
        """Checkpoint of noise predictor and text encoder."""
        return self.root / "unet.safetensors"


def to_model(pixels: np.ndarray) -> Tensor:
    """Turns uint8 [B, 64, 64, 3] into [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def draw_pictures(work: WorkFolder, recipe: Recipe) -> None:
    """Draws the pictures to train on, in two processes."""
    if work.pictures.exists():
        return
    console.log(f"drawing {recipe.cached_pictures} pictures")
    pixels = draw_many(recipe.seed, recipe.cached_pictures, workers=2)
    with replacing(work.pictures) as temporary, temporary.open("wb") as file:
        np.save(file, pixels, allow_pickle=False)


def _pictures(work: WorkFolder) -> np.ndarray:
    return np.load(work.pictures, mmap_mode="c", allow_pickle=False)


def train_vae(work: WorkFolder, recipe: Recipe) -> None:
    """Trains the autoencoder, and measures it on pictures it has not seen."""
    torch.manual_seed(derive_seed(recipe.seed, "vae weights"))
    vae = build_vae()
    pictures = _pictures(work)

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "vae", step, shard))
        chosen = torch.randint(len(pictures), (recipe.vae.shard,), generator=draws)
        real = to_model(pictures[chosen.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = encode(vae, real)
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=draws)
            made = decode(vae, mean + noise * torch.exp(0.5 * log_variance)).float()
        return picture_loss(made, real) + KL_WEIGHT * kl_loss(mean, log_variance)

    fit("vae", vae, loss_of_shard, recipe.vae, work.vae)
    if not work.vae_figures.exists():
        load_ema(vae, work.vae)
        write_json(work.vae_figures, measure_vae(vae, recipe.seed, FRESH_PICTURES))


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, seed: int, count: int) -> dict[str, float]:
    """Measures reconstruction on pictures outside of the training set.

    Args:
        vae: the autoencoder.
        seed: of the training pictures.
        count: how many pictures.

    Returns:
        PSNR in dB of the mean squared error over all pictures, and for each background.
    """
    fresh = [draw(derive_seed(seed, "fresh"), index) for index in range(count)]
    errors = []
    for start in range(0, count, 64):
        real = to_model(np.stack([picture.pixels for picture in fresh[start : start + 64]]))
        made = decode(vae, encode(vae, real).mode()).clamp(-1, 1)
        errors.append(((made - real) / 2).square().mean((1, 2, 3)))
    error = torch.cat(errors)
    figures = {"psnr_db": float(-10 * error.mean().log10())}
    for name in BACKGROUNDS:
        chosen = torch.tensor([picture.background == name for picture in fresh])
        figures[f"psnr_db_{name}"] = float(-10 * error[chosen].mean().log10())
    return figures


@torch.no_grad()
def encode_latents(work: WorkFolder, recipe: Recipe) -> None:
    """Encodes all pictures once, and whitens the latents channel by channel."""
    if work.latents.exists():
        return
    vae = build_vae()
    load_ema(vae, work.vae)
    pictures = _pictures(work)

    @torch.no_grad()
    def encode_from(start: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            batch = to_model(pictures[start : start + ENCODED_AT_ONCE])
            return encode(vae, batch).mode().float()

    starts = range(0, len(pictures), ENCODED_AT_ONCE)
    with one_core_each() as pool:
        parts = track(pool.map(encode_from, starts), "latents", len(starts), console=console)
        latents = torch.cat(list(parts))
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    with replacing(work.latents) as temporary:
        tensors = {"latents": latents.half().contiguous(), "mean": mean, "std": std}
        save_file(tensors, temporary)


def prompt_tokens() -> Tensor:
    """Returns the prompts as tokens [91, 24]: 45 with article, 45 bare, and the empty one."""
    prompts = [*map(article_prompt, ANIMALS), *ANIMALS, ""]
    tokens = build_tokenizer()(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens["input_ids"]


def train_unet(work: WorkFolder, recipe: Recipe) -> None:
    """Trains noise predictor and text encoder on the cached latents."""
    torch.manual_seed(derive_seed(recipe.seed, "unet weights"))
    denoiser = Denoiser()
    latents = load_file(work.latents)["latents"]
    alphas_cumprod = build_scheduler().alphas_cumprod
    weights = min_snr_weight(alphas_cumprod)
    tokens = prompt_tokens()
    batch, animals = recipe.unet.shard, len(ANIMALS)

    def predict(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return denoiser.unet(x_t, t, text).sample.float()

    predict = torch.compile(predict, dynamic=False) if recipe.compile else predict

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "unet", step, shard))
        chosen = torch.randint(len(latents), (batch,), generator=draws)
        bare = torch.rand(batch, generator=draws) < BARE
        dropped = torch.rand(batch, generator=draws) < DROPPED
        prompt = torch.where(dropped, 2 * animals, chosen % animals + animals * bare)
        # One timestep from each of `batch` equal slices: less variance than independent ones.
        spread = (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
        t = (spread * len(weights)).long()
        x_0 = latents[chosen].float()
        noise = torch.randn(x_0.shape, generator=draws)
        alpha = alphas_cumprod[t][:, None, None, None]
        x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
        used, place = prompt.unique(return_inverse=True)
        text = denoiser.text_encoder(tokens[used]).last_hidden_state
        # `index_select` and not `text[place]`, whose gradient is summed in no fixed order.
        predicted = predict(x_t, t, text.index_select(0, place))
        return noise_loss(predicted, noise, weights[t])

    fit("unet", denoiser, loss_of_shard, recipe.unet, work.unet)
