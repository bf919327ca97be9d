#!/bin/bash
# initramfs.sh OUT.cpio INIT 'MODULE …' [FILE:DEST …]: busybox, the modules with what they need in load order, INIT as /init, and the files.
set -euo pipefail
cache=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/minivmm-lab}/cloud
out=$(realpath -m "$1") init=$2 modules=$3
shift 3
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{bin,dev,proc,sys,tmp,etc,mnt,out,root,lib/modules}
cp /bin/busybox "$tree/bin/"
for applet in $(/bin/busybox --list); do [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"; done
install -m 755 "$init" "$tree/init"
version=$(cat "$cache/KVER")
dir=$cache/modules/lib/modules/$version
: >"$tree/lib/modules/order"
for module in $modules; do
  # "insmod /path/x.ko" lines, dependencies first; what is built in says "builtin"
  modprobe -d "$cache/modules" -S "$version" --show-depends "$module" | sed -n 's/^insmod //p' | while read -r ko _; do
    grep -qx "$(basename "$ko")" "$tree/lib/modules/order" && continue
    cp "$ko" "$tree/lib/modules/"
    basename "$ko" >>"$tree/lib/modules/order"
  done
done
[ -d "$dir" ]
for pair in "$@"; do
  mkdir -p "$tree$(dirname "${pair#*:}")"
  cp -aL --reflink=auto "${pair%%:*}" "$tree${pair#*:}"
done
(cd "$tree" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$out"
