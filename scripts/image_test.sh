#!/usr/bin/env bash
# Builds the image without a daemon and runs the service from it as the cluster does: as uid 1000 on a read-only root,
# with only /tmp, /dev/shm and $HOME writable, in its own namespaces. The smoke load must pass.
#   make image-test BUILD_FLAGS='--volume /srv/wheels:/srv/wheels:ro'
# Needs root and Debian's buildah, debootstrap and iproute2. Arguments are passed to `buildah bud`. IMAGE_DIRECTORY
# keeps the base and the layers between runs, about 10 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly DIRECTORY=${IMAGE_DIRECTORY:-$HOME/.cache/farsight/image}
readonly IMAGE=localhost/farsight:cpu
BASE=docker.io/library/$(sed -n 's/^FROM \(python:[^ ]*\) AS base$/\1/p' Dockerfile)
readonly BASE

for command in buildah debootstrap ip; do
    command -v "$command" >/dev/null || { echo "image-test needs $command: apt-get install buildah debootstrap iproute2" >&2; exit 1; }
done
[[ $(id -u) == 0 ]] || { echo "image-test needs root: it creates namespaces and mounts" >&2; exit 1; }

buildah() { # vfs needs no overlay mounts, chroot needs no container runtime
    command buildah --root "$DIRECTORY/storage" --runroot "$DIRECTORY/run" --storage-driver vfs "$@"
}

stand_in_for_the_base() { # Debian with its own Python 3.11; the official image builds its own
    local root=$DIRECTORY/base container
    rm -rf --one-file-system "$root"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root"
    ln -s /usr/bin/python3 "$root/usr/local/bin/python"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" /
    buildah commit --quiet --rm "$container" "$BASE"
    rm -rf "$root"
}

mkdir -p "$DIRECTORY"
buildah inspect --type image "$BASE" >/dev/null 2>&1 || stand_in_for_the_base
# --format docker: OCI images have no health check
buildah bud --isolation chroot --layers --pull-never --format docker --tag "$IMAGE" "$@" .

container=$(buildah from --pull-never "$IMAGE")
trap 'buildah rm "$container" >/dev/null; buildah rmi --prune >/dev/null' EXIT
root=$(buildah mount "$container")
du -sh "$root" | cut -f1 | sed 's/^/size of the root file system: /'
buildah inspect --type image "$IMAGE" >"$DIRECTORY/image.json"
unshare --mount --mount-proc --pid --fork --kill-child --net --ipc --uts .venv/bin/python scripts/image_run.py "$root" "$DIRECTORY/image.json"
