#!/bin/bash
# l1.sh [-i FILE[:DEST]]… [-x PROGRAM[:DEST]]… [-d IMAGE]… [-p PORT] [-o DIR] [-m MIB] [-c CPUS] [-t SECONDS] COMMAND: boots L1 with the files (and programs with their
# libraries) in it and raw IMAGEs as its read-only disks (/dev/vdb … when there is -o), runs COMMAND by sh, streams its output, returns its status. What it leaves in /out is unpacked into DIR.
# PORT of this machine leads to L1's port 4445 (10.0.2.15). 124: it took too long; 125: L1 died.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/minivmm-lab}/cloud
memory=1536 cpus=1 limit=300 out= port= disks=()
work=$(mktemp -d "${TMPDIR:-/tmp}/lab.XXXXXX")
qemu=
trap '[ -z "$qemu" ] || kill -9 "$qemu" 2>/dev/null; rm -rf "$work"' EXIT
mkdir "$work/tree"
put() {
  local from=${1%%:*} to=${1#*:}
  [ "$to" != "$1" ] || to=/$(basename "$from")
  mkdir -p "$work/tree$(dirname "$to")"
  cp -aL --reflink=auto "$from" "$work/tree$to"
}
while getopts i:x:d:p:o:m:c:t: option; do
  case $option in
  i) put "$OPTARG" ;;
  x)
    put "$OPTARG"
    ldd "${OPTARG%%:*}" 2>/dev/null | grep -o '/[^ )]*' | while read -r library; do
      mkdir -p "$work/tree$(dirname "$library")"
      cp -L "$library" "$work/tree$library"
    done
    ;;
  d) disks+=("$OPTARG") ;;
  p) port=$OPTARG ;;
  o) out=$OPTARG ;;
  m) memory=$OPTARG ;;
  c) cpus=$OPTARG ;;
  t) limit=$OPTARG ;;
  *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
base=$cache/l1-$(sha256sum "$here/l1init" "$here/initramfs.sh" "$here/l1.sh" | sha256sum | cut -c1-12).cpio
[ -f "$base" ] || { "$here/initramfs.sh" "$base.new" "$here/l1init" "kvm-amd virtio_pci virtio_blk virtio_net tun" && mv "$base.new" "$base"; }
printf '%s\n' "$*" >"$work/tree/lab.cmd"
(cd "$work/tree" && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0) >"$work/files.cpio"
cat "$base" "$work/files.cpio" >"$work/initrd"              # not compressed: unpacking is dear under TCG
rm -rf "$work/tree" "$work/files.cpio"
drives=()
if [ -n "$out" ]; then
  truncate -s 512M "$work/out.raw"
  drives=(-drive "if=none,id=out,file=$work/out.raw,format=raw" -device virtio-blk-pci,drive=out,serial=labout)
fi
for n in "${!disks[@]}"; do
  drives+=(-drive "if=none,id=d$n,file=${disks[n]},format=raw,read-only=on" -device "virtio-blk-pci,drive=d$n")
done
[ -z "$port" ] || drives+=(-netdev "user,id=u,restrict=on,hostfwd=tcp:127.0.0.1:$port-10.0.2.15:4445" -device virtio-net-pci,netdev=u)
: >"$work/status"
timeout -k 5 "$limit" qemu-system-x86_64 -M q35 -accel tcg,thread=multi,tb-size=512 -cpu max -smp "$cpus" -m "$memory" \
  -nodefaults -no-user-config -display none -no-reboot -kernel "$cache/vmlinux" -initrd "$work/initrd" \
  -append "console=ttyS1 quiet loglevel=3 mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on panic=-1 reboot=t" \
  -serial stdio -device isa-debug-exit,iobase=0xf4,iosize=1 \
  -chardev "file,id=st,path=$work/status" -device isa-serial,iobase=0x2f8,irq=3,chardev=st,index=1 \
  "${drives[@]}" </dev/null &
qemu=$!
code=0
wait $qemu || code=$?
qemu=
if [ -n "$out" ]; then
  mkdir -p "$out"
  tar x -C "$out" -f "$work/out.raw" 2>/dev/null || true
fi
status=$(tr -d '\r' <"$work/status" | sed -n 's/.*LAB-STATUS \([0-9]*\).*/\1/p' | tail -1)
[ -z "$status" ] || exit "$status"
tail -n 40 "$work/status" >&2                               # L1's kernel console
[ $code != 124 ] && [ $code != 137 ] || { echo "lab: L1 took more than ${limit} s" >&2; exit 124; }
echo "lab: L1 ended without a status (qemu: $code)" >&2
exit 125
