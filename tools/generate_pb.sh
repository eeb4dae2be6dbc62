#!/bin/sh
# Generates cluster/pb from proto/. The files import each other by the path that protoc saw; the last
# line turns that into the path of the package (protoc offers no option for it).
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I proto \
    --python_out=cluster/pb --grpc_python_out=cluster/pb --mypy_out=cluster/pb --mypy_grpc_out=cluster/pb \
    proto/expertmesh/v1/*.proto
sed -i 's/from expertmesh\.v1 import/from cluster.pb.expertmesh.v1 import/' cluster/pb/expertmesh/v1/*_pb2*
