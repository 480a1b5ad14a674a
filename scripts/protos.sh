#!/usr/bin/env bash
# Regenerate the gRPC stubs next to their .proto files: scripts/protos.sh [output root, default the repository]
#
# The generator is pinned in its own environment: code from grpcio-tools 1.75.1 (protobuf 6.31.1) loads with every
# protobuf >= 6.31 and grpcio >= 1.75; code from a newer generator would require its own runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-.}")
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet grpcio-tools==1.75.1
mkdir -p "$out"
# paths from the root make the imports package-relative: from service.api.proto import ...
"$venv/bin/python" -m grpc_tools.protoc --proto_path=. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    service/api/proto/open_inference_grpc.proto
