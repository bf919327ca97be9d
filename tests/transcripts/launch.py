#!/usr/bin/env python3
"""launch.py NEEDS.json SOCKET SOCKET2: a transcript's `needs` as a minivmm config; then becomes minivmm ($MINIVMM).

`needs` says neutrally what the server must be started with (TRANSCRIPTS.md beside the transcripts): drives, controllers,
devices, netdevs, memory, processors. What minivmm does not have yet is an error from minivmm itself, and the transcript
fails at its first step."""
import json
import os
import sys

# No IDE here: to a monitor a CD drive is a CD drive, on whatever bus.
FRONTENDS = {"virtio-blk": "virtio-blk-pci", "scsi-hd": "scsi-hd", "scsi-cd": "scsi-cd", "ide-hd": "ide-hd",
             "ide-cd": "scsi-cd", "floppy": "floppy"}
MODELS = {"virtio-scsi": "virtio-scsi-pci", "virtio-balloon": "virtio-balloon-pci", "virtio-net": "virtio-net-pci"}


def value(v):
    """v as TOML."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + " }"
    return json.dumps(v)


def table(name, members):
    return f"[{name}]\n" + "".join(f"{json.dumps(k)} = {value(v)}\n" for k, v in members.items() if v is not None)


def config(needs, sockets):
    out = [table("machine", {
        "memory": f"{max(needs.get('ram_mib', 16), 16)}M",
        "max-memory": f"{needs['max_ram_mib']}M" if "max_ram_mib" in needs else None,
        "memory-slots": needs.get("memory_slots"),
        "cpus": needs.get("vcpus"), "max-cpus": needs.get("max_vcpus"), "sockets": needs.get("sockets"),
        "cores": needs.get("cores"), "threads": needs.get("threads"),
        "accel": "none", "paused": needs.get("paused", False)})]
    out += [table("[qmp]", {"socket": s}) for s in sockets[:needs.get("qmp_sockets", 1)]]
    controllers = list(needs.get("controllers", []))
    if not controllers and any(d.get("frontend") == "ide-cd" for d in needs.get("drives", [])):
        controllers.append({"kind": "virtio-scsi"})
    for c in controllers:
        out.append(table("[device]", {"driver": MODELS.get(c["kind"], c["kind"]), "id": c.get("id")}))
    # nodes, drives, devices: the order in which QEMU makes them, whatever their order on its command line is
    nodes, drives, devices = [], [], []
    for d in needs.get("drives", []):
        drive = d.get("id")
        if drive is not None:
            drives.append(table("[drive]", {"if": "none", "id": drive, "file": d.get("filename"), "format": d.get("format"),
                                         "node-name": d.get("node-name"), "read-only": d.get("read-only")}))
        elif "filename" in d:
            drive = d["node-name"]
            below = {"driver": "file", "filename": d["filename"]}
            if "file-node-name" in d:
                below["node-name"] = d["file-node-name"]
            nodes.append(table("[blockdev]", {"driver": d["format"], "node-name": drive, "read-only": d.get("read-only"),
                                            "file": below}))
        if "frontend" in d:
            devices.append(table("[device]", {"driver": FRONTENDS[d["frontend"]], "id": d.get("device-id"), "drive": drive}))
    out += nodes + drives + devices
    for n in needs.get("netdevs", []):
        out.append(table("[netdev]", {"type": "user", "id": n["id"]}))
    for d in needs.get("devices", []):
        rest = {k: v for k, v in d.items() if k != "kind"}
        out.append(table("[device]", {"driver": MODELS.get(d["kind"], d["kind"]), **rest}))
    return "\n".join(out)


def main(needs_file, *sockets):
    with open(needs_file, encoding="utf-8") as f:
        needs = json.load(f)
    path = os.path.join(os.path.dirname(needs_file), "minivmm.toml")
    with open(path, "w", encoding="utf-8") as f:
        f.write(config(needs, sockets))
    program = os.environ.get("MINIVMM", "minivmm")
    os.execv(program, [program, path])


main(*sys.argv[1:])
