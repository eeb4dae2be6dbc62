#!/usr/bin/env bash
# Makes the virtual environment that the Makefile's targets run in, and does nothing when it is
# there and up to date.
#
#   tools/bootstrap.sh run      what serving takes
#   tools/bootstrap.sh dev      that, and what the tests and checks take
#
# VENV names the directory (.venv), PYTHON the interpreter (python3), and TORCH_INDEX the address of a
# package index to take torch from, and CONSTRAINTS a file of pinned versions (constraints-cpu.txt).
set -euo pipefail
cd "$(dirname "$0")/.."

what="${1:-run}"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"
constraints="${CONSTRAINTS:-constraints-cpu.txt}"
needed_mib=3000

fail() {
    printf 'bootstrap: %s\n' "$@" >&2
    exit 1
}

step() {
    printf '\n== %s\n' "$*"
}

# Shows pip's progress on a terminal, and elsewhere the lines that say what is fetched, and its size.
quietly_pip() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
    if [ -t 1 ]; then
        "${pip[@]}" "$@"
    else
        "${pip[@]}" "$@" | awk '/^ *(Downloading|Using cached|Processing|Installing|Successfully)/ { print; fflush() }'
    fi
}

case "$what" in
    run) groups=() ;;
    dev) groups=(--group dev) ;;
    *) fail "asked for '$what'; it is 'run' or 'dev'" ;;
esac

wanted="$(cat pyproject.toml clients/python/pyproject.toml "$constraints" | sha256sum | cut -d' ' -f1) ${TORCH_INDEX:-}"
for done in "$what" dev; do
    if [ "$(cat "$venv/.bootstrap-$done" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c ''; then
        exit 0
    fi
done

command -v "$python" >/dev/null || fail "there is no $python here" "  apt-get install python3 python3-venv make"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: 3.11 or newer is needed (PYTHON=... names another one)"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" --version) lacks its venv module" "  apt-get install python3-venv"
free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "$free_mib" -ge "$needed_mib" ] || fail "$free_mib MiB are free here, and setting up takes $needed_mib MiB"

started=$SECONDS
step "1/4 virtual environment in $venv ($("$python" --version))"
rm -f "$venv"/.bootstrap-*
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv"
fi

step "2/4 pip (Debian's own does not know dependency groups)"
quietly_pip install --upgrade 'pip>=25.1'

torch="$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
if [ -n "${TORCH_INDEX:-}" ]; then
    step "3/4 $torch from $TORCH_INDEX"
    quietly_pip install --no-deps --index-url "$TORCH_INDEX" "$torch" # the rest comes in step 4
else
    step "3/4 $torch from the default index"
    echo "On Linux the default index serves torch's CUDA build, several gigabytes. To use no GPU, stop here and"
    echo "name PyTorch's own index of CPU wheels, one file of about 190 MB: make TORCH_INDEX=... (see README)"
    quietly_pip install --constraint "$constraints" "$torch"
fi

step "4/4 expertmesh, its client library, and the packages that they need ($what)"
quietly_pip install --constraint "$constraints" --editable . --editable clients/python "${groups[@]}"
echo "$wanted" >"$venv/.bootstrap-$what"
printf '\n== set up in %d s; %s holds %s\n' $((SECONDS - started)) "$venv" "$(du -sh "$venv" | cut -f1)"
