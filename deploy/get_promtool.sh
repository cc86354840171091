#!/usr/bin/env bash
# Puts promtool into build/tools: out of Debian's package prometheus, which is unpacked, not installed. So it needs no
# root and starts no server. Where that fails it says so, and the tests of deploy/ that need promtool are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/build/tools
if command -v promtool >/dev/null || [ -x "$tools/promtool" ]; then exit 0; fi

# Lists and downloads of its own: the system's belong to root.
apt=(apt-get -qq -o "Dir::State=$tools/apt/state" -o "Dir::Cache=$tools/apt/cache" -o APT::Sandbox::User=
    -o Dir::State::status=/var/lib/dpkg/status)
mkdir -p "$tools"/apt/{state/lists,cache/archives}/partial
if (cd "$tools/apt" && "${apt[@]}" update && "${apt[@]}" download prometheus); then
    dpkg-deb --fsys-tarfile "$tools"/apt/prometheus_*.deb | tar -x -C "$tools" --strip-components=3 ./usr/bin/promtool
else
    echo "promtool is missing, and Debian's package prometheus cannot be had: https://prometheus.io/download has it" >&2
fi
rm -rf "$tools/apt"
