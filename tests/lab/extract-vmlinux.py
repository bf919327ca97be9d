#!/usr/bin/env python3
"""extract-vmlinux.py BZIMAGE OUT: the ELF vmlinux inside an x86 bzImage, found by its setup header
(Documentation/arch/x86/boot.rst: payload_offset, payload_length)."""
import struct
import subprocess
import sys

COMPRESSIONS = [
    (b"\x02\x21\x4c\x18", ["lz4", "-dc"]),                 # legacy frame, as the kernel's build writes it
    (b"\xfd7zXZ\x00", ["xz", "-dc", "--single-stream"]),
    (b"\x28\xb5\x2f\xfd", ["zstd", "-dc"]),
    (b"\x1f\x8b", ["gzip", "-dc"]),
]


def main(source, target):
    image = open(source, "rb").read()
    if image[0x202:0x206] != b"HdrS":
        sys.exit(f"{source}: not a bzImage")
    setup_sectors = (image[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup_sectors * 512 + offset:][:length]
    size = struct.unpack("<I", payload[-4:])[0]              # the build appends the uncompressed size
    for magic, command in COMPRESSIONS:
        if payload.startswith(magic):
            out = subprocess.run(command, input=payload[:-4], stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL).stdout[:size]
            break
    else:
        sys.exit(f"{source}: unknown compression {payload[:6]!r}")
    if not out.startswith(b"\x7fELF") or len(out) != size:
        sys.exit(f"{source}: {len(out)} bytes came out, {size} were promised")
    open(target, "wb").write(out)


main(*sys.argv[1:3])
