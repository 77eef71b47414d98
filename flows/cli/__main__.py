"""`python -m ddpo_workflow.flows.cli`: the same as the command `ddpo`."""

from ddpo_workflow.flows.cli.app import main

main()
