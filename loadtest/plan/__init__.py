"""Decides what a run sends and when: options, traces, arrivals, prompts; defines the record of a request."""

from loadtest.plan.job import Job, RunFailed, base_url
from loadtest.plan.options import LoadOptions, OptionError, add_flags, options_from
from loadtest.plan.plan import Plan, PlannedRequest, make_plan
from loadtest.plan.prompts import PromptMaker, Scale
from loadtest.plan.records import Outcome, RequestRecord
from loadtest.plan.slo import Slo, num_good
from loadtest.plan.traces import BLOCK_TOKENS, TraceRequest, read_mooncake

__all__ = [
    "BLOCK_TOKENS",
    "Job",
    "LoadOptions",
    "OptionError",
    "Outcome",
    "Plan",
    "PlannedRequest",
    "PromptMaker",
    "RequestRecord",
    "RunFailed",
    "Scale",
    "Slo",
    "TraceRequest",
    "add_flags",
    "base_url",
    "make_plan",
    "num_good",
    "options_from",
    "read_mooncake",
]
