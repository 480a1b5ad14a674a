#!/usr/bin/env bash
# kubectl for the tests of deploy/kustomize (it renders without a cluster): from PATH, otherwise Debian's package, unpacked
# into .tools/ (no root, nothing is installed). Debian 13's on any Debian: 12 has 1.20, which is too old for these files.
# If neither is available, prints a warning and exits with 0: those tests are then skipped, and fail under CI=true.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v kubectl > /dev/null || [ -x .tools/kubectl ]; then exit 0; fi
keys=/usr/share/keyrings/debian-archive-keyring.gpg
if ! { command -v apt-get && command -v dpkg && [ -r $keys ]; } > /dev/null; then
    echo "scripts/kubectl.sh: found neither kubectl nor Debian's apt-get; manifests will not be tested" >&2
    exit 0
fi
mkdir -p .tools
work=$(realpath "$(mktemp -d .tools/XXXXXX)")
trap 'rm -rf "$work"' EXIT
# the mirror of this machine's own packages
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/$' || true)
echo "deb [signed-by=$keys] ${mirror:-no://mirror/} trixie main" > "$work/sources.list"
own=(-qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache=$work" -o APT::Sandbox::User=root -o Debug::NoLocking=true)
mkdir -p "$work/lists/partial" "$work/archives/partial"
if (cd "$work" && apt-get "${own[@]}" update && apt-get "${own[@]}" download kubectl/trixie) 2> "$work/log"; then
    dpkg -x "$work"/kubectl_*.deb "$work/unpacked"
    mv -T "$work/unpacked/usr/bin/kubectl" .tools/kubectl # atomic: an interrupted copy must not look complete
else
    cat "$work/log" >&2
    echo "scripts/kubectl.sh: Debian's kubectl could not be downloaded; manifests will not be tested" >&2
fi
