"""A session of QEMU's own Python client (qemu.qmp from PyPI) with minivmm: qemu_qmp.py SOCKET"""
import asyncio
import os
import sys

from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError


async def session(socket):
    client = QMPClient("minivmm-test")
    await client.connect(socket)
    assert client.greeting.QMP.version["package"].startswith("minivmm"), client.greeting
    assert await client.execute("query-status") == {"running": True, "status": "running"}
    names = {command["name"] for command in await client.execute("query-commands")}
    assert {"stop", "cont", "blockdev-add", "query-qmp-schema"} <= names

    with client.listener("STOP") as stopped:
        await client.execute("stop")
        event = await asyncio.wait_for(stopped.get(), 10)
        assert event["event"] == "STOP" and set(event["timestamp"]) == {"seconds", "microseconds"}
    assert (await client.execute("query-status"))["status"] == "paused"
    await client.execute("cont")

    try:
        await client.execute("blockdev-add", {"driver": "null-co"})
        raise AssertionError("no error for a root node without a name")
    except ExecuteError as error:
        assert str(error) == "'node-name' must be specified for the root node", error
    await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 1 << 20})
    nodes = await client.execute("query-named-block-nodes")
    assert [n["image"]["virtual-size"] for n in nodes] == [1 << 20], nodes
    await client.execute("blockdev-del", {"node-name": "n0"})

    # many at once: the replies find their requests by id
    replies = await asyncio.gather(*(client.execute("query-name") for _ in range(50)))
    assert replies == [{"name": "python"}] * 50, replies

    read, write = os.pipe()
    client.send_fd_scm(read)
    added = await client.execute("add-fd", {"opaque": "a pipe"})
    sets = await client.execute("query-fdsets")
    assert sets == [{"fdset-id": 0, "fds": [{"fd": added["fd"], "opaque": "a pipe"}]}], sets
    os.close(read)
    os.write(write, b"still open at the other end")

    with client.listener("SHUTDOWN") as down:
        await client.execute("quit")
        assert (await asyncio.wait_for(down.get(), 10))["data"] == {"guest": False, "reason": "host-qmp-quit"}
    try:
        await client.disconnect()
    except (EOFError, QMPError):
        pass    # the server was quicker
    print("session done")


asyncio.run(session(sys.argv[1]))
