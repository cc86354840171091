"""Decides what a run sends and when: options, traces, arrivals, prompts; defines the record of a request."""

from loadtest.plan.arrivals import spread_ties, stretched
from loadtest.plan.job import Job, Origin, RunFailed, base_url
from loadtest.plan.objectives import AUTO, lone_ttft_s, objectives_from
from loadtest.plan.options import LoadOptions, OptionError, add_flags, options_from, settings_text
from loadtest.plan.plan import Plan, PlannedRequest, make_plan
from loadtest.plan.prompts import PromptMaker, Scale, word
from loadtest.plan.records import Outcome, RequestRecord, percentile
from loadtest.plan.slo import Slo, num_good
from loadtest.plan.traces import BLOCK_TOKENS, TraceRequest, read_mooncake, read_trace

__all__ = [
    "AUTO",
    "BLOCK_TOKENS",
    "Job",
    "LoadOptions",
    "OptionError",
    "Origin",
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
    "lone_ttft_s",
    "make_plan",
    "num_good",
    "objectives_from",
    "options_from",
    "percentile",
    "read_mooncake",
    "read_trace",
    "settings_text",
    "spread_ties",
    "stretched",
    "word",
]
