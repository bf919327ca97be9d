//! Exports over NBD: `nbd-server-start`, `block-export-add` and the others.
//!
//! Owns: their form, and making the listening socket. Never: exports' rules (`control/exports.rs`).
//! Threads: control. Locks: none.

use super::cmd_bitmap::BlockDirtyBitmapOrStr;
use super::cmd_blockdev::find_node;
use super::schema::Cx;
use crate::control::exports::NbdExport;
use crate::error::{Error, Result, strerror};
use crate::nbd::listener::Setup;
use crate::nbd::options::*;
use crate::sys::{listen, unix};
use crate::{bail, commands, wire_enum, wire_struct, wire_union};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

wire_enum! {
    /// What becomes of an export's clients.
    pub enum BlockExportRemoveMode {
        /// They keep it from being removed.
        "safe" Safe,
        /// They are disconnected.
        "hard" Hard,
    }
    default Safe
}

wire_struct! {
    /// An export for NBD clients.
    pub struct BlockExportOptionsNbd {
        /// Its name for clients; the node's by default.
        name: Option<String>,
        /// What clients show to people.
        description: Option<String>,
        /// Dirty bitmaps that clients can ask about (`qemu:dirty-bitmap:NAME`): of the node, of one
        /// behind it, or of the node that is named.
        bitmaps: Option<Vec<BlockDirtyBitmapOrStr>>,
        /// Clients can ask in which image of the chain a place lies (`qemu:allocation-depth`).
        "allocation-depth" allocation_depth: Option<bool>,
    }
}

wire_union! {
    /// An export.
    pub struct BlockExportOptions {}
    /// Its protocol.
    "type" => pub enum BlockExportType as kind {
        /// NBD.
        "nbd" Nbd(BlockExportOptionsNbd),
    }
    .. {
        /// Its name for QMP; unique among exports.
        id: String,
        /// What is exported.
        "node-name" node_name: String,
        /// Clients may write; by default they may not.
        writable: Option<bool>,
        /// Each write is followed by a flush; by default clients flush.
        writethrough: Option<bool>,
        /// No device takes the node to another thread: none ever does here.
        "fixed-iothread" fixed_iothread: Option<bool>,
        /// The `iothread` object whose thread serves clients: refused, since each client has threads of
        /// its own.
        iothread: Option<String>,
    }
}

wire_struct! {
    /// An export, as `query-block-exports` shows it.
    pub struct BlockExportInfo {
        /// Its name for QMP.
        id: String,
        /// Its protocol.
        "type" kind: String,
        /// What is exported.
        "node-name" node_name: String,
        /// It is being removed, and waits for its clients' requests to end.
        "shutting-down" shutting_down: bool,
    }
}

commands! {
    /// Exports over NBD.
    pub static NBD;

    /// Starts the NBD server, of which there is one. Without TLS: `tls-creds` is refused.
    "nbd-server-start" => nbd_server_start(NbdServerOptions) -> ();

    /// Exports a node, or a drive, under its own name. (`block-export-add` is the newer way.)
    "nbd-server-add" => nbd_server_add {
        /// The name for clients and for QMP; `device` by default.
        name: Option<String>,
        /// What clients show to people.
        description: Option<String>,
        /// The node or drive.
        device: String,
        /// Clients may write, if the node is writable.
        writable: Option<bool>,
        /// A dirty bitmap that clients can ask about (`qemu:dirty-bitmap:NAME`).
        bitmap: Option<String>,
    } -> ();

    /// Removes an export.
    "nbd-server-remove" => nbd_server_remove {
        /// Its name.
        name: String,
        /// What becomes of its clients (default: `safe`).
        mode: Option<BlockExportRemoveMode>,
    } -> ();

    /// Stops the NBD server and removes all exports.
    "nbd-server-stop" => nbd_server_stop {} -> ();

    /// Exports a node.
    "block-export-add" => block_export_add(BlockExportOptions) -> ();

    /// Removes an export. `BLOCK_EXPORT_DELETED` tells when it is gone.
    "block-export-del" => block_export_del {
        /// Its name for QMP.
        id: String,
        /// What becomes of its clients (default: `safe`).
        mode: Option<BlockExportRemoveMode>,
    } -> ();

    /// Lists the exports.
    "query-block-exports" => query_block_exports {} -> Vec<BlockExportInfo>;
}

fn nbd_server_start(cx: &mut Cx, o: NbdServerOptions) -> Result<()> {
    let Cx { vm, conn } = cx;
    vm.start_nbd(|_| {
        if let Some(id) = o.tls_creds {
            bail!("No TLS credentials with id '{id}'");
        }
        if o.tls_authz.is_some() {
            bail!("TLS authorization needs TLS, which this server does not have");
        }
        let (socket, file) = match o.addr.kind {
            SocketAddressLegacyType::Inet(a) => (a.data.listen()?, None),
            SocketAddressLegacyType::Unix(a) => {
                let failed =
                    |e| Error::new(format!("Failed to bind socket to {}: {}", a.data.path, strerror(&e)));
                let (socket, file) = listen::on_path(Path::new(&a.data.path)).map_err(failed)?;
                (socket, Some(file))
            }
            SocketAddressLegacyType::Fd(a) => {
                let fd = conn.take_named(&a.data.str)?;
                match unix::kind(fd.as_fd()) {
                    unix::Kind::Other => bail!("File descriptor '{}' is not a socket", a.data.str),
                    unix::Kind::Listener => {}
                    _ => listen::on_fd(fd.as_fd()).map_err(|e| {
                        Error::new(format!("Failed to listen on fd socket: {}", strerror(&e)))
                    })?,
                }
                unix::set_nonblocking(fd.as_fd(), true)?;
                (fd, None)
            }
        };
        let handshake = Some(o.handshake.unwrap_or(10)).filter(|&s| s != 0);
        Ok(Setup {
            socket,
            file,
            max_connections: o.max_connections.unwrap_or(100) as usize,
            handshake: handshake.map(|s| Duration::from_secs(s.into())),
        })
    })
}

fn nbd_server_add(
    cx: &mut Cx,
    name: Option<String>,
    description: Option<String>,
    device: String,
    writable: Option<bool>,
    bitmap: Option<String>,
) -> Result<()> {
    let node = find_node(cx, Some(&device), Some(&device))?;
    let id = name.unwrap_or(device);
    // This command has always made a read-only export of a read-only node.
    let writable = writable.unwrap_or(false) && !node.read_only();
    cx.vm.add_export(NbdExport {
        name: Some(id.clone()),
        id,
        node,
        description,
        writable,
        writethrough: false,
        bitmaps: bitmap.map(|name| (None, name)).into_iter().collect(),
        allocation_depth: false,
    })
}

fn block_export_add(cx: &mut Cx, o: BlockExportOptions) -> Result<()> {
    let BlockExportType::Nbd(nbd) = o.kind;
    // Before the node is looked for, as in QEMU; the rest is looked at after it.
    cx.vm.check_export_id(&o.id)?;
    let node = find_node(cx, None, Some(&o.node_name))?;
    if let Some(id) = &o.iothread {
        if cx.vm.objects.iothread(id).is_err() {
            bail!("iothread \"{id}\" not found");
        }
        bail!(
            "iothread \"{id}\" cannot serve an export, whose clients have threads of their own: leave it out"
        );
    }
    cx.vm.add_export(NbdExport {
        id: o.id,
        node,
        name: nbd.name,
        description: nbd.description,
        writable: o.writable.unwrap_or(false),
        writethrough: o.writethrough.unwrap_or(false),
        bitmaps: nbd.bitmaps.into_iter().flatten().map(named).collect(),
        allocation_depth: nbd.allocation_depth.unwrap_or(false),
    })
}

fn named(bitmap: BlockDirtyBitmapOrStr) -> (Option<String>, String) {
    match bitmap {
        BlockDirtyBitmapOrStr::Local(name) => (None, name),
        BlockDirtyBitmapOrStr::External(b) => (Some(b.node), b.name),
    }
}

fn nbd_server_remove(cx: &mut Cx, name: String, mode: Option<BlockExportRemoveMode>) -> Result<()> {
    block_export_del(cx, name, mode)
}

fn nbd_server_stop(cx: &mut Cx) -> Result<()> {
    cx.vm.stop_nbd()
}

fn block_export_del(cx: &mut Cx, id: String, mode: Option<BlockExportRemoveMode>) -> Result<()> {
    cx.vm.remove_export(&id, mode.unwrap_or_default() == BlockExportRemoveMode::Hard)
}

fn query_block_exports(cx: &mut Cx) -> Result<Vec<BlockExportInfo>> {
    let show = |e: std::sync::Arc<crate::nbd::export::Export>| BlockExportInfo {
        id: e.id.clone(),
        kind: "nbd".into(),
        node_name: e.handle.node().map(|n| n.name.clone()).unwrap_or_default(),
        shutting_down: e.is_closing(),
    };
    Ok(cx.vm.exports.list().into_iter().map(show).collect())
}

#[cfg(test)]
#[path = "cmd_nbd_test.rs"]
mod tests;
