#!/usr/bin/env bash
# `make test-image`: from the files of this clone to a container that serves, without a container engine. Fine-tune digits, build the
# image with Debian's buildah on a base image of debootstrap's, and let tests/deploy/test_image.py boot it. Needs root, for mounts.
# What is not there is said and skipped, so that CI can call it anywhere. KEEP=1 leaves build/image for a second look. FLAVOUR=cuda does the
# same with the image for GPUs, on the CPU: 12 GB of disk, and kernels that mount overlay for root.
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
# A storage of its own: the base has the name of one that others may have.
# vfs works anywhere, and copies a layer for each one on it, which torch's gigabytes do not bear.
STORAGE_DRIVER=vfs
if [[ $FLAVOUR == cuda ]]; then STORAGE_DRIVER=overlay; fi
export STORAGE_DRIVER CONTAINERS_STORAGE_CONF=$WORK/storage.conf BUILDAH_ISOLATION=chroot BENTOML_HOME=$WORK/bentoml
bootstrapping=
remove() {
    if [[ $bootstrapping ]] && kill "$bootstrapping" 2> /dev/null; then wait "$bootstrapping" || true; fi
    if [[ -f $CONTAINERS_STORAGE_CONF ]]; then buildah rm --all > /dev/null; fi
    # A debootstrap that was cut off leaves its mounts.
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

# As Docker's Python image: pip may install, and there is no cache. What a container engine puts over it at start has to be there.
rm -rf "$WORK"/rootfs/usr/lib/python3*/EXTERNALLY-MANAGED "$WORK"/rootfs/var/cache/apt/archives/*.deb "$WORK"/rootfs/var/lib/apt/lists/*
touch "$WORK"/rootfs/etc/hosts
base=$(buildah from scratch)
buildah copy -q "$base" "$WORK/rootfs" / > /dev/null
buildah commit -q --rm "$base" docker.io/library/python:3.11-slim > /dev/null

step "the Bento and its image"
# What this machine's pip needs to reach its registry goes into the build alone.
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
# Its package needs another pandas than ours: an environment of its own.
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
