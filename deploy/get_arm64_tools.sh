#!/usr/bin/env bash
# Puts a C compiler for 64-bit ARM and qemu's emulator of its processes into build/tools/arm64: out of Debian's packages,
# which are unpacked, not installed (100 MB, no root). Where that fails it says so, and the test that needs them
# says it, too; in CI it fails.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/build/tools/arm64
if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then exit 0; fi
if [ -x "$tools/bin/aarch64-linux-gnu-gcc" ] && [ -x "$tools/bin/qemu-aarch64" ]; then exit 0; fi

# Lists and downloads of its own: the system's belong to root.
apt=(apt-get -qq -o Acquire::Retries=3 -o "Dir::State=$tools/apt/state" -o "Dir::Cache=$tools/apt/cache" -o APT::Sandbox::User=
    -o Dir::State::status=/var/lib/dpkg/status)
gcc=12
packages=(gcc-$gcc-aarch64-linux-gnu cpp-$gcc-aarch64-linux-gnu binutils-aarch64-linux-gnu libgcc-$gcc-dev-arm64-cross
    libc6-arm64-cross libc6-dev-arm64-cross linux-libc-dev-arm64-cross qemu-user-static)
mkdir -p "$tools"/apt/{state/lists,cache/archives}/partial "$tools/bin"
if (cd "$tools/apt" && "${apt[@]}" update && "${apt[@]}" download "${packages[@]}"); then
    for package in "$tools"/apt/*.deb; do
        case $package in
            */qemu-*) dpkg-deb --fsys-tarfile "$package" | tar -xO ./usr/bin/qemu-aarch64-static > "$tools/bin/qemu-aarch64" ;;
            *) dpkg-deb --extract "$package" "$tools" ;;
        esac
    done
    # The compiler looks for the C library below /usr, and its assembler for its own libraries.
    cat > "$tools/bin/aarch64-linux-gnu-gcc" <<WRAPPER
#!/bin/sh
export PATH="$tools/usr/bin:\$PATH" LD_LIBRARY_PATH="$tools/usr/lib/x86_64-linux-gnu"
exec aarch64-linux-gnu-gcc-$gcc -isystem "$tools/usr/aarch64-linux-gnu/include" -B"$tools/usr/aarch64-linux-gnu/lib" \\
    -L"$tools/usr/aarch64-linux-gnu/lib" "\$@"
WRAPPER
    chmod +x "$tools"/bin/*
else
    echo "a compiler for ARM64 is missing, and Debian's package gcc-aarch64-linux-gnu cannot be had; nor qemu-user" >&2
fi
rm -rf "$tools/apt"
