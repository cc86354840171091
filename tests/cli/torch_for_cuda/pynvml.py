"""A driver whose one GPU has 1 MiB, half of it free."""

from types import SimpleNamespace


class NVMLError(Exception): ...


def nvmlInit(): ...


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetName(handle):
    return "NVIDIA Small"


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=1 << 20, free=1 << 19)
