#!/bin/sh
# Generates cluster/pb and the Python client's own copy from proto/. The files import each other by the
# path that protoc saw; sed turns that into the path of the package (protoc offers no option for it).
# The client's messages live in pools of their own: so it can be imported beside a server of another
# version, whose files have the same names.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
PATH="$(dirname "$python"):$PATH"

generate() { # INTO ARGUMENTS...
    into="$1"
    shift
    "$python" -m grpc_tools.protoc --python_out="$into" --grpc_python_out="$into" \
        --mypy_out="$into" --mypy_grpc_out="$into" "$@"
}

generate cluster/pb -I proto proto/expertmesh/v1/*.proto
sed -i 's/from expertmesh\.v1 import/from cluster.pb.expertmesh.v1 import/' cluster/pb/expertmesh/v1/*_pb2*

client=clients/python
pb="$client/src/expertmesh_client/_pb"
generate "$pb" -I proto proto/expertmesh/v1/inference.proto
"$python" -m grpc_tools.protoc -I "$client/proto" --python_out="$pb" --mypy_out="$pb" "$client/proto/details.proto"
sed -i 's/from expertmesh\.v1 import/from expertmesh_client._pb.expertmesh.v1 import/' "$pb"/expertmesh/v1/*_pb2*
sed -i 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' "$pb"/*_pb2.py "$pb"/expertmesh/v1/*_pb2.py
