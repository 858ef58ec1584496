#!/usr/bin/env bash
# `make test-image`: build the image from this clone and boot it, without a container engine.
#
# It fine-tunes digits, builds the image with Debian's buildah on a base image from debootstrap, and lets
# tests/deploy/test_image.py boot it. It mounts, so it needs root. Without its tools it is skipped with a
# message, so that CI can call it anywhere. KEEP=1 keeps build/image. FLAVOUR=cuda tests the image for GPUs
# on the CPU; it needs 12 GB of disk and a kernel that mounts overlay for root.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "test-image: skipped: $*"
    exit 0
}

[[ $(id -u) == 0 ]] || skip "it mounts, and so must be root"
for program in buildah debootstrap unshare setpriv; do
    command -v "$program" > /dev/null || skip "there is no $program here (Debian: apt-get install buildah debootstrap)"
done
unshare --mount --pid --fork true 2> /dev/null || skip "this machine allows no namespaces"

FLAVOUR=${FLAVOUR:-cpu}
WORK=$PWD/build/image
PYTHON=$PWD/.venv/bin/python
# Its own storage, because the base image has the name of an official one. vfs works anywhere but copies
# each layer, which is too much for torch.
STORAGE_DRIVER=vfs
if [[ $FLAVOUR == cuda ]]; then STORAGE_DRIVER=overlay; fi
export STORAGE_DRIVER CONTAINERS_STORAGE_CONF=$WORK/storage.conf BUILDAH_ISOLATION=chroot BENTOML_HOME=$WORK/bentoml
bootstrapping=
remove() {
    if [[ $bootstrapping ]] && kill "$bootstrapping" 2> /dev/null; then wait "$bootstrapping" || true; fi
    if [[ -f $CONTAINERS_STORAGE_CONF ]]; then buildah rm --all > /dev/null; fi
    # An interrupted debootstrap leaves its mounts.
    umount --quiet "$WORK"/rootfs/{proc,sys} 2> /dev/null || true
    rm -rf --one-file-system "$WORK"
}
remove
mkdir -p "$WORK/project" "$BENTOML_HOME"
[[ ${KEEP:-} ]] || trap remove EXIT
trap 'exit 1' INT TERM
printf '[storage]\ndriver = "%s"\ngraphroot = "%s/storage"\nrunroot = "%s/runroot"\n' "$STORAGE_DRIVER" "$WORK" "$WORK" > "$CONTAINERS_STORAGE_CONF"
step() { printf 'test-image: %3d s  %s\n' "$SECONDS" "$*"; }

step "a base image by debootstrap, and meanwhile fine-tuning digits"
debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates \
    bookworm "$WORK/rootfs" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$WORK/debootstrap.log" 2>&1 &
bootstrapping=$!
git ls-files -z | xargs -0 cp --parents -t "$WORK/project"
(cd "$WORK/project" && "$PYTHON" finetune/run.py) > "$WORK/run.log" 2>&1 || { cat "$WORK/run.log"; exit 1; }
wait $bootstrapping || skip "debootstrap could not fetch Debian: $(tail -1 "$WORK/debootstrap.log")"

# As in Docker's Python image pip may install, and there is no cache. Container engines mount over
# /etc/hosts, so it must exist.
rm -rf "$WORK"/rootfs/usr/lib/python3*/EXTERNALLY-MANAGED "$WORK"/rootfs/var/cache/apt/archives/*.deb "$WORK"/rootfs/var/lib/apt/lists/*
touch "$WORK"/rootfs/etc/hosts
base=$(buildah from scratch)
buildah copy -q "$base" "$WORK/rootfs" / > /dev/null
buildah commit -q --rm "$base" docker.io/library/python:3.11-slim > /dev/null

step "the Bento and its image"
# This machine's pip settings are secrets of the build.
{
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n'
    for option in index-url trusted-host; do
        value=$("$PYTHON" -m pip config get "global.$option" 2> /dev/null) && printf '%s = %s\n' "$option" "$value"
    done
    true
} > "$WORK/pip.conf"
(cd "$WORK/project" && "$PYTHON" deploy/image.py --flavour "$FLAVOUR" --backend buildah \
    --pip-conf "$WORK/pip.conf" --ca "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}")

step "its file system"
buildah inspect --type image "graft:$FLAVOUR" > "$WORK/image.json"
buildah mount "$(buildah from --pull-never "graft:$FLAVOUR")" > "$WORK/mounted"

step "KServe's objects, as its own API knows them"
# In its own environment, because kserve needs another version of pandas.
kserve=("$PWD/.venv/bin/uv" run --quiet --no-project --with kserve==0.21.0 python)
if "${kserve[@]}" -c "import kserve" 2> "$WORK/kserve.log"; then
    "${kserve[@]}" tests/deploy/kserve_schema.py deploy/kubernetes/kserve/*.yaml
else
    step "skipped: kserve cannot be installed: $(tail -1 "$WORK/kserve.log")"
fi

step "boot it"
GRAFT_IMAGE_DIR=$WORK GRAFT_IMAGE_FLAVOUR=$FLAVOUR timeout 300 "$PYTHON" -m pytest -m image tests/deploy/test_image.py
cat "$WORK/report"
step "done"
