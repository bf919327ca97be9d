//! Exports of nodes over NBD: which there are, and when one ends.
//!
//! Owns: the server and the list of exports, with QEMU's rules and texts. Never: JSON, the protocol.
//! Threads: control. Locks: none of its own; waits for no client, and for requests at a disk only
//! when the server stops.

use super::vm::Vm;
use crate::bail;
use crate::block::bitmap::{Bitmap, Refuse};
use crate::block::driver::Perm;
use crate::block::graph::well_formed;
use crate::block::handle::HandleSpec;
use crate::block::node::Node;
use crate::error::{Error, Result};
use crate::nbd::export::{Context, Export, Registry, Spec};
use crate::nbd::listener::{Server, Setup};
use crate::nbd::proto::MAX_STRING;
use serde_json::json;
use std::sync::Arc;

/// See the module's head.
#[derive(Default)]
pub struct Exports {
    registry: Arc<Registry>,
    server: Option<Server>,
    /// The configuration names a server, which is started when everything else is there.
    pub expected: bool,
}

impl Exports {
    /// All, newest first.
    pub fn list(&self) -> Vec<Arc<Export>> {
        let mut all = self.registry.all();
        all.reverse();
        all
    }

    /// The server, while it runs.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }
}

/// `block-export-add` for type `nbd`.
pub struct NbdExport {
    /// Its name for QMP.
    pub id: String,
    /// What is exported.
    pub node: Arc<Node>,
    /// Its name for clients; absent: the node's.
    pub name: Option<String>,
    /// What people are told about it.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Each write is followed by a flush.
    pub writethrough: bool,
    /// Dirty bitmaps that clients can ask about, each with the node that is named for it.
    pub bitmaps: Vec<(Option<String>, String)>,
    /// Clients can ask in which image of the chain a place lies.
    pub allocation_depth: bool,
}

impl Vm {
    /// `nbd-server-start`: `setup` makes the socket.
    pub fn start_nbd(&mut self, setup: impl FnOnce(&mut Vm) -> Result<Setup>) -> Result<()> {
        if self.exports.server.is_some() {
            bail!("NBD server already running");
        }
        let setup = setup(self)?;
        let server = Server::start(setup, self.exports.registry.clone())?;
        self.exports.server = Some(server);
        self.exports.expected = false;
        Ok(())
    }

    /// `nbd-server-stop`: with all exports.
    pub fn stop_nbd(&mut self) -> Result<()> {
        if self.exports.server.is_none() {
            bail!("NBD server not running");
        }
        self.close_exports();
        Ok(())
    }

    /// Stops the server, if there is one, and ends all exports.
    pub(super) fn close_exports(&mut self) {
        let all = self.exports.list();
        all.iter().for_each(|e| e.close());
        self.exports.server = None;
        self.exports.expected = false;
        all.iter().for_each(|e| self.end_export(e));
    }

    /// Whether a new export may have that id.
    pub fn check_export_id(&self, id: &str) -> Result<()> {
        if !well_formed(id) {
            bail!("Invalid block export id");
        }
        if self.exports.registry.find(id).is_some() {
            bail!("Block export id '{id}' is already in use");
        }
        Ok(())
    }

    /// Adds an export.
    pub fn add_export(&mut self, o: NbdExport) -> Result<()> {
        self.check_export_id(&o.id)?;
        if o.writable && o.node.read_only() {
            bail!("Cannot export read-only node as writable");
        }
        if self.exports.server.is_none() && !self.exports.expected {
            bail!("NBD server not running");
        }
        let name = o.name.clone().unwrap_or_else(|| o.node.name.clone());
        if name.len() > MAX_STRING {
            bail!("export name '{name}' too long");
        }
        if let Some(text) = o.description.as_ref().filter(|d| d.len() > MAX_STRING) {
            bail!("description '{text}' too long");
        }
        if self.exports.list().iter().any(|e| e.name == name) {
            bail!("NBD server already has export named '{name}'");
        }
        let mut contexts = Vec::new();
        if o.allocation_depth {
            contexts.push(Context::Depth);
        }
        let bitmaps = self.export_bitmaps(&o)?;
        contexts.extend(bitmaps.iter().cloned().map(Context::Bitmap));
        let uses = if o.writable { Perm::CONSISTENT_READ | Perm::WRITE } else { Perm::CONSISTENT_READ };
        let spec = HandleSpec {
            uses,
            // Clients are told the length once.
            shares: !Perm::RESIZE,
            write_cache: !o.writethrough,
            ..HandleSpec::default()
        };
        let handle = self.graph.attach_as(Some(o.node), spec, &o.id)?;
        bitmaps.iter().for_each(|b| b.set_busy(true));
        let spec = Spec { id: o.id, name, description: o.description, writable: o.writable, contexts };
        self.exports.registry.add(Export::new(spec, handle, self.events.clone()));
        Ok(())
    }

    fn export_bitmaps(&self, o: &NbdExport) -> Result<Vec<Arc<Bitmap>>> {
        let mut all: Vec<Arc<Bitmap>> = Vec::new();
        for (node, name) in &o.bitmaps {
            let found = match node {
                Some(node) => self.graph.need(node)?.find_bitmap(name),
                None => std::iter::successors(Some(o.node.clone()), behind).find_map(|n| n.find_bitmap(name)),
            };
            let Some(bitmap) = found else { bail!("Bitmap '{name}' is not found") };
            bitmap.check(Refuse::Busy)?;
            if all.iter().any(|b| b.name() == bitmap.name()) {
                bail!("Bitmap '{name}' is named twice");
            }
            // Its contents would change, although nobody writes to the export.
            if !o.writable && !o.node.read_only() && bitmap.enabled() {
                bail!("Enabled bitmap '{name}' incompatible with readonly export");
            }
            all.push(bitmap);
        }
        Ok(all)
    }

    /// `block-export-del`: `hard` shows clients out, else they keep it from ending.
    pub fn remove_export(&mut self, id: &str, hard: bool) -> Result<()> {
        let Some(export) = self.exports.registry.find(id) else {
            return Err(Error::new(format!("Export '{id}' is not found")));
        };
        if export.is_closing() {
            bail!("Export '{id}' is already shutting down");
        }
        if !hard && export.clients() > 0 {
            bail!("export '{id}' still in use");
        }
        export.close();
        self.reap_exports();
        Ok(())
    }

    /// Ends the exports that are closing and have no clients any more.
    pub fn reap_exports(&mut self) {
        for export in self.exports.list() {
            if export.is_closing() && export.clients() == 0 {
                self.end_export(&export);
            }
        }
    }

    fn end_export(&mut self, export: &Arc<Export>) {
        self.graph.detach(&export.handle);
        for context in &export.contexts {
            if let Context::Bitmap(bitmap) = context {
                bitmap.set_busy(false);
            }
        }
        self.exports.registry.remove(export);
        self.emit("BLOCK_EXPORT_DELETED", json!({ "id": export.id }));
    }
}

/// The node that a node stands for, or that is behind it.
fn behind(node: &Arc<Node>) -> Option<Arc<Node>> {
    node.filtered().or_else(|| node.backing())
}
