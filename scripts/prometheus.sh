#!/usr/bin/env bash
# Prometheus and promtool for the tests of deploy/monitoring: from PATH, otherwise Debian's package unpacked into .tools/
# (no root, nothing is installed). If neither is available, prints a warning and exits with 0: those tests are then
# skipped, and fail under CI=true.
set -euo pipefail
cd "$(dirname "$0")/.."
if { command -v promtool && command -v prometheus; } > /dev/null || [ -x .tools/usr/bin/promtool ]; then exit 0; fi
if ! { command -v apt-get && command -v dpkg; } > /dev/null; then
    echo "scripts/prometheus.sh: found neither promtool nor apt-get; rules and dashboard will not be tested" >&2
    exit 0
fi
mkdir -p .tools
work=$(realpath "$(mktemp -d .tools/XXXXXX)")
trap 'rm -rf "$work"' EXIT
# separate package lists: a fresh machine has none, and only root can fetch the machine's
own=(-qq -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o APT::Sandbox::User=root -o Debug::NoLocking=true)
mkdir -p "$work/lists/partial" "$work/archives/partial"
if (cd "$work" && { apt-get -qq download prometheus || { apt-get "${own[@]}" update && apt-get "${own[@]}" download prometheus; }; }) 2> "$work/log"; then
    dpkg -x "$work"/prometheus_*.deb "$work/unpacked"
    mkdir -p .tools/usr
    mv -T "$work/unpacked/usr/bin" .tools/usr/bin # atomic: an interrupted copy must not look complete
else
    cat "$work/log" >&2
    echo "scripts/prometheus.sh: Debian's prometheus could not be downloaded; rules and dashboard will not be tested" >&2
fi
