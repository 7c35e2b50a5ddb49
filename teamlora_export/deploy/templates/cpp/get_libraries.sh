#!/bin/sh
# Puts what CMake looks for into a folder, from Debian's and Python's package registries; installs nothing.
#
#     sh get_libraries.sh FOLDER       then: cmake ... -DCMAKE_PREFIX_PATH=FOLDER (an absolute path)
#
# ONNX Runtime's and onnxruntime-genai's libraries come from their Python packages, ONNX Runtime's headers from Debian 13
# (what is built with them runs with any later ONNX Runtime), nlohmann-json and OpenSSL from Debian 12. Needs apt-get and
# dpkg, python3 with pip. Not needed where these are installed, or unpacked from their releases.
set -eu

folder=${1:?give the folder to write}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The mirror that this machine uses, with lists and a cache of our own beside apt's.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
    awk '$2 == "bookworm" || $2 == "trixie" { print $1; exit }')
if [ -z "$mirror" ]; then
    echo "get_libraries.sh: knows Debian 12 and 13 alone. Unpack the releases of the libraries instead; see README.md." >&2
    exit 2
fi
keys=/usr/share/keyrings/debian-archive-keyring.gpg
for release in bookworm trixie; do
    echo "deb [signed-by=$keys] $mirror $release main"
done > "$work/sources.list"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
apt() {
    (cd "$work" && apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
        -o APT::Sandbox::User=root "$@" > /dev/null)
}
apt update
apt download libonnxruntime-dev/trixie nlohmann-json3-dev/bookworm libssl-dev/bookworm
for package in "$work"/*.deb; do
    dpkg -x "$package" "$work/unpacked"
done
# They point to libraries of packages that are not here. OpenSSL has a static one as well.
find "$work/unpacked" -name '*.so' -delete

"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" onnxruntime onnxruntime-genai
for wheel in "$work"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/wheels"
done

mkdir -p "$folder/lib"
cp -r "$work/unpacked/usr/." "$folder"
cp "$work"/wheels/onnxruntime/capi/libonnxruntime.so.* "$work/wheels/onnxruntime_genai/libonnxruntime-genai.so" "$folder/lib"
cd "$folder/lib"
ln -sf libonnxruntime.so.*.* libonnxruntime.so.1
ln -sf libonnxruntime.so.1 libonnxruntime.so
