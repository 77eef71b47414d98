"""What Prefect's pages keep of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

from ddpo_workflow.flows.train import train
from tests.tiny import tiny_config


@pytest.mark.slow
def test_runs_whose_names_look_alike_to_prefect_keep_their_own_artifacts(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    names = ("look.alike", "look-alike", "Look_Alike")
    for store, name in [("store", name) for name in names] + [("other-store", names[0])]:
        config = tiny_config(
            tiny_model,
            sampler={"steps": 2},
            rollouts={"samples_per_epoch": 4, "shard_size": 4},
            storage={"root": str(tmp_path / store)},
            tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            outputs=str(tmp_path / "outputs"),
            epochs=1,
        )
        (tmp_path / "config.yaml").write_text(config.model_dump_json())
        train(str(tmp_path / "config.yaml"), run_id=name)
    with get_client(sync_client=True) as client:
        latest = client.read_latest_artifacts(
            artifact_filter=ArtifactCollectionFilter(
                key=ArtifactCollectionFilterKey(like_="look-alike-")
            )
        )
    own = [a for a in latest if str(a.key).startswith("look-alike-")]  # the server has others
    leading = [str(a.data) for a in own if str(a.key).endswith("-mlflow")]
    assert len(leading) == 4
    assert all(f"ui --tracking sqlite:///{tmp_path}/mlflow.db" in text for text in leading)
    for part, word in (("progress", "{}: 1 epochs"), ("epoch", "Epoch 0 of {}")):
        shown = [artifact.description for artifact in own if str(artifact.key).endswith(part)]
        assert sorted(map(str, shown)) == sorted(word.format(n) for n in [*names, names[0]])
