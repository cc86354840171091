"""Sends what was planned, open loop: the HTTP client, the targets, one rate after another."""

from loadtest.send.client import API_KEY_VARIABLE, Client, ServedModel, TargetError, look_up_model
from loadtest.send.dispatch import Dispatcher, Progress
from loadtest.send.local_stack import start_stack, stop_stack
from loadtest.send.random_model import ModelFailed, make_random_model
from loadtest.send.sweep import Sweep, SweepFailed, SweepWatcher, run_sweep
from loadtest.send.targets import PRESETS, Target, parse_target

__all__ = [
    "API_KEY_VARIABLE",
    "PRESETS",
    "Client",
    "Dispatcher",
    "ModelFailed",
    "Progress",
    "ServedModel",
    "Sweep",
    "SweepFailed",
    "SweepWatcher",
    "Target",
    "TargetError",
    "look_up_model",
    "make_random_model",
    "parse_target",
    "run_sweep",
    "start_stack",
    "stop_stack",
]
