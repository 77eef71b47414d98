"""A run from random weights: it resumes, forks and is evaluated like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from ddpo.analysis.evaluation.plan import evaluation_set
from ddpo.basics.images import decode_image
from ddpo.diffusion.sampling import sample
from ddpo.runs import open_run
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EVALUATION_SHARD
from ddpo.store.objects import Store
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks import worker
from tests.night import Place
from tests.tiny import assert_same_tensors, load_policy, tiny_config

pytestmark = pytest.mark.slow

RUN, EPOCHS = "r", 2


def record(model: Path, database: Path, folder: Path, *epochs: int, **changes: Any) -> Place:
    """Train up to these epochs, one start after the other, each with the model loaded anew."""
    folder.mkdir(exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    config = tiny_config(
        model,
        trainable={"type": "full", "from_scratch": True},
        prompts={"name": "colored_discs", "parameters": {}},
        reward={"name": "disc_match"},
        sampler={"steps": 2, "guidance_scale": 1.0},
        optimizer={"learning_rate": 1e-3},
        storage={"root": str(folder / "store")},
        tracking={"uri": f"sqlite:///{folder}/mlflow.db"},
        outputs=str(folder / "outputs"),
        **changes,
    )
    file = folder / "config.yaml"
    for until in epochs:
        worker.forget()
        file.write_text(config.changed(epochs=until).model_dump_json())
        train(str(file), run_id=RUN)
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


def checkpoint(place: Place, run_id: str, epoch: int) -> Checkpoint:
    return CHECKPOINT.require(place.store, Partition(run_id, epoch))


@pytest.fixture(scope="module")
def place(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    """Two epochs at once, with evaluations."""
    part = {"every": 1, "count": 2, "seeds": [0, 1], "steps": 2}
    folder = tmp_path_factory.mktemp("scratch")
    return record(tiny_model, mlflow_database, folder, EPOCHS, evaluation=part)


def test_checkpoint_0_holds_the_random_weights_and_training_moves_them(place: Place) -> None:
    run = place.run(RUN)
    fresh = load_policy(run.config).weights.state()
    assert_same_tensors(checkpoint(place, RUN, 0).state().weights, fresh)
    pretrained = StableDiffusionPipeline.from_pretrained(run.config.model.path).unet.state_dict()
    last = checkpoint(place, RUN, EPOCHS).state().weights
    name = "conv_in.weight"
    assert not fresh[name].equal(pretrained[name]) and not last[name].equal(fresh[name])
    assert run.labels["from_scratch"] is True


def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(
    place: Place, tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    resumed = record(tiny_model, mlflow_database, tmp_path / "resumed", 1, EPOCHS)
    kinds = ("checkpoints/", "rollouts/", "trajectories/", "rewards/", "advantages/")
    keys = [key for key in place.store.list() if key.startswith(kinds)]
    assert len(keys) > 15
    assert keys == [key for key in resumed.store.list() if key.startswith(kinds)]
    assert all(place.store.read(key) == resumed.store.read(key) for key in keys)


def test_a_fork_goes_on_from_its_weights(place: Place) -> None:
    fork(RUN, 1, fork_id="again", storage=place.store.root)
    for epoch in (1, EPOCHS):
        assert place.weights("again", epoch) == place.weights(RUN, epoch)


def test_the_first_evaluation_shows_the_random_network(place: Place) -> None:
    run = place.run(RUN)
    assert run.config.evaluation
    images = evaluation_set(run, run.config.evaluation)
    rows = EVALUATION_SHARD.require(run.store, Partition(RUN, 0, 0, images_id=images.set_id)).rows()
    drawn = sample(
        load_policy(run.config),
        [row.prompt for row in rows],
        [row.seed for row in rows],
        images.sampler,
    )
    for row, image in zip(rows, drawn.images, strict=True):
        assert np.array_equal(np.asarray(decode_image(row.image_png)), np.asarray(image))


def test_the_exported_pipeline_has_the_last_checkpoints_network(place: Place) -> None:
    run = open_run(place.store, RUN)
    plain = StableDiffusionPipeline.from_pretrained(Path(run.config.outputs) / RUN / "pipeline")
    assert_same_tensors(plain.unet.state_dict(), checkpoint(place, RUN, EPOCHS).state().weights)
