"""Requests of a user, as the command line and Prefect's forms fill them in."""

from ddpo_workflow.flows.run_requests.base import Request
from ddpo_workflow.flows.run_requests.comparison import (
    CompareRequest,
    ComparisonPlan,
    check_comparison,
)
from ddpo_workflow.flows.run_requests.runs import (
    ForkRequest,
    ResumeRequest,
    TrainRequest,
    new_run_id,
    run_name_stem,
)
from ddpo_workflow.flows.run_requests.saved import (
    EvaluateRequest,
    EvaluationPlan,
    RescoreRequest,
    Rescoring,
    rescorable_epochs,
)

__all__ = [
    "CompareRequest",
    "ComparisonPlan",
    "EvaluateRequest",
    "EvaluationPlan",
    "ForkRequest",
    "Request",
    "RescoreRequest",
    "Rescoring",
    "ResumeRequest",
    "TrainRequest",
    "check_comparison",
    "new_run_id",
    "rescorable_epochs",
    "run_name_stem",
]
