"""Block jobs on a running guest's disk, by the Python client qemu.qmp: host/jobs.py PORT. Prints `ok …` and `FAIL …` lines."""
import asyncio
import sys
import time

from qemu.qmp import EventListener, QMPClient


async def connect(port):
    """Connects once the monitor is there: until then the port's forwarder hangs up at once."""
    end = time.time() + 400
    while True:
        client = QMPClient("lab")
        try:
            await asyncio.wait_for(client.connect(("127.0.0.1", port)), 10)
            return client
        except Exception:  # the forwarder's many ways to say no
            if time.time() > end:
                raise
            await asyncio.sleep(1)


class Lab:
    def __init__(self, client):
        self.client = client
        self.events = EventListener()
        client.register_listener(self.events)

    async def do(self, command, **arguments):
        return await self.client.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    async def event(self, name, job=None, seconds=240):
        async def wait():
            async for event in self.events:
                data = event["data"]
                if event["event"] == name and job in (None, data.get("device"), data.get("id")):
                    return data

        return await asyncio.wait_for(wait(), seconds)

    async def done(self, job):
        data = await self.event("BLOCK_JOB_COMPLETED", job)
        assert "error" not in data, data
        assert data["len"] == data["offset"], data

    async def file(self):
        return next(b for b in await self.do("query-block") if b["device"] == "d0")["inserted"]["file"]

    async def writes(self):
        stats = next(s for s in await self.do("query-blockstats") if s.get("device") == "d0")
        return stats["stats"]["wr_operations"]

    async def busy(self):
        """Waits until the guest has written some more: no step is to find a disk at rest."""
        start = await self.writes()
        for _ in range(240):
            if await self.writes() > start + 40:
                return
            await asyncio.sleep(0.5)
        raise TimeoutError("the guest does not write")


async def full(lab):
    await lab.do("transaction", actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "disk0", "name": "b0"}},
        {"type": "drive-backup", "data": {"device": "d0", "job-id": "full", "target": "/full.qcow2",
                                          "format": "qcow2", "sync": "full"}},
    ])
    await lab.done("full")


async def snapshot_and_commit(lab):
    await lab.do("blockdev-snapshot-sync", device="d0", snapshot_file="/snap.qcow2", format="qcow2")
    await lab.busy()
    await lab.do("block-commit", device="d0", job_id="commit", base_node="disk0")
    await lab.event("BLOCK_JOB_READY", "commit")
    await lab.do("job-complete", id="commit")
    await lab.done("commit")
    assert await lab.file() == "/jobs.qcow2", await lab.file()


async def incremental(lab):
    await lab.do("drive-backup", device="d0", job_id="inc", target="/inc.qcow2", format="qcow2", sync="incremental",
                 bitmap="b0")
    await lab.done("inc")


async def mirror(lab):
    await lab.do("drive-mirror", device="d0", job_id="mirror", target="/mirror.qcow2", format="qcow2", sync="full",
                 node_name="copy", copy_mode="write-blocking")
    await lab.event("BLOCK_JOB_READY", "mirror")
    await lab.busy()
    await lab.do("job-complete", id="mirror")
    await lab.done("mirror")
    assert await lab.file() == "/mirror.qcow2", await lab.file()
    await lab.busy()


async def main():
    client = await connect(int(sys.argv[1]))
    lab = Lab(client)
    try:
        for step in (full, snapshot_and_commit, incremental, mirror):
            name = step.__name__.replace("_", "-")
            try:
                await lab.busy()
                await step(lab)
                print(f"ok jobs-{name}", flush=True)
            except Exception as e:  # the rest is worth trying
                print(f"FAIL jobs-{name}: {type(e).__name__} {e}", flush=True)
        print("ok jobs-none-left" if await lab.do("query-jobs") == [] else "FAIL jobs-none-left", flush=True)
    finally:
        await lab.do("system_powerdown")
        await client.disconnect()


asyncio.run(main())
