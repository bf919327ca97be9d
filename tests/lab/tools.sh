#!/bin/bash
# tools.sh: prints the path of an ext4 image with fio and what it needs for the guest, made once; in the cache.
set -euo pipefail
cache=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/minivmm-lab}
PATH=$PATH:/sbin
fio=$(command -v fio) || { echo "lab: missing Debian package: fio" >&2; exit 1; }
image=$cache/tools-$(sha256sum "$fio" "$0" | sha256sum | cut -c1-12).raw
if [ ! -f "$image" ]; then
  tree=$(mktemp -d)
  trap 'rm -rf "$tree" "$image.new"' EXIT
  mkdir -p "$tree"/{bin,dev,proc,sys,tmp,mnt}
  cp /bin/busybox "$tree/bin/"
  ln -s busybox "$tree/bin/sh"
  cp "$fio" "$tree/bin/"
  ldd "$fio" | grep -o '/[^ )]*' | while read -r library; do
    mkdir -p "$tree$(dirname "$library")"
    cp -L "$library" "$tree$library"
  done
  mkfs.ext4 -q -F -O ^has_journal -d "$tree" "$image.new" "$(($(du -sm "$tree" | cut -f1) + 24))M" >/dev/null
  mv "$image.new" "$image"
fi
echo "$image"
