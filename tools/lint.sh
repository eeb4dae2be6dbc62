#!/usr/bin/env bash
# Checks everything that needs no test run: format, lint, types, layers, generated code, wire contracts.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$PWD/.venv/bin"

check() {
    local name="$1" started=$SECONDS
    shift
    printf '== %s\n' "$name"
    "$@"
    printf '== %s: passed in %d s\n\n' "$name" $((SECONDS - started))
}

# Generates into a copy, and shows what differs from the files that are committed.
generated_code_is_fresh() (
    copy="$(mktemp -d)"
    trap 'rm -rf "$copy"' EXIT
    mkdir "$copy/cluster"
    cp -r proto tools clients "$copy"
    cp -r cluster/pb "$copy/cluster"
    find "$copy" -name '*_pb2*' -delete
    PYTHON="$bin/python" "$copy/tools/generate_pb.sh"
    for pb in cluster/pb clients/python/src/expertmesh_client/_pb; do
        diff -r --exclude=__pycache__ "$pb" "$copy/$pb" || {
            echo "$pb is not what proto/ generates: run make pb" >&2
            return 1
        }
    done
)

wire_contracts() (
    cd proto
    "$bin/buf" lint
)

check "format (ruff)" "$bin/ruff" format --check
check "lint (ruff)" "$bin/ruff" check
check "types (mypy)" "$bin/mypy"
check "layers (import-linter)" "$bin/lint-imports"
check "generated code" generated_code_is_fresh
check "wire contracts (buf)" wire_contracts
check "Dockerfile (hadolint)" "$bin/hadolint" helm/Dockerfile
