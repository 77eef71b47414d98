"""A nightly run takes the date as its seed, and keeps it when it is retried."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry, Scheduled

from ddpo.errors import ConfigError
from ddpo.runs import open_run
from ddpo.store.objects import Store
from ddpo_workflow.flows import train as training
from tests.tiny import tiny_config

REPOSITORY = Path(__file__).parents[2]
NIGHT = datetime(2024, 12, 24, 23, 0, tzinfo=UTC)  # past: Prefect waits for what is to come


def test_the_schedule_asks_for_a_fresh_seed_and_the_form_says_so() -> None:
    (deployment,) = [
        deployment
        for deployment in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
        if deployment.get("schedules")
    ]
    (schedule,) = deployment["schedules"]
    assert training.train.validate_parameters(schedule["parameters"])["seed_of_date"] is True
    described = training.train.parameters.properties["seed_of_date"]["description"]
    assert "date" in described and "nightly" in described


@pytest.mark.slow
def test_a_retry_on_the_next_day_keeps_the_seed() -> None:
    @flow
    def nightly() -> int:
        return training.fresh_seed(None, None)

    with get_client(sync_client=True) as client:
        created = client.create_flow_run(nightly, state=Scheduled(scheduled_time=NIGHT))
        assert run_flow(nightly, flow_run=created) == 20241224
        later = AwaitingRetry(scheduled_time=NIGHT + timedelta(days=1))
        client.set_flow_run_state(created.id, later, force=True)
        again = client.read_flow_run(created.id)
        assert run_flow(nightly, flow_run=again) == 20241224


@pytest.mark.parametrize(("run_id", "seed"), [("night", None), (None, 3), ("night", 0)])
def test_a_given_name_or_seed_contradicts_it(run_id: str | None, seed: int | None) -> None:
    with pytest.raises(ConfigError, match=r"seed_of_date .* (run_id|seed) is set too"):
        training.fresh_seed(run_id, seed)


@pytest.mark.slow
def test_the_run_has_the_date_as_its_seed(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model,
        epochs=1,
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        outputs=str(tmp_path / "outputs"),
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = datetime.now(UTC)
    run = open_run(
        Store.open(str(tmp_path / "store")), training.train(str(file), seed_of_date=True)
    )
    assert f"{before:%Y%m%d}" <= str(run.config.seed) <= f"{datetime.now(UTC):%Y%m%d}"
