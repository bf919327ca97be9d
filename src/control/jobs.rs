//! Jobs and the rest of the VM: their events, and the names of disks in their messages.
//!
//! Owns: what QMP calls a job's events. Never: how jobs work (`jobs/` does). Threads: control. Locks:
//! none.

use super::vm::Vm;
use crate::bail;
use crate::block::graph::Parent;
use crate::block::node::Node;
use crate::error::Result;
use crate::event::ErrorAction;
use crate::jobs::registry::{JobEvent, Report};
use crate::jobs::table::Kind;
use serde_json::{Value, json};
use std::sync::Arc;

fn report(r: Report) -> Value {
    json!({
        "type": r.kind.as_str(),
        "device": r.id,
        "len": r.progress.len,
        "offset": r.progress.offset,
        "speed": r.speed,
    })
}

impl Vm {
    /// Sends on what has become of the jobs. The QMP server calls it before it sends events; nobody
    /// else needs to.
    pub fn tell_jobs(&mut self) {
        for event in std::mem::take(&mut self.jobs.out) {
            let (name, data) = match event {
                JobEvent::Status(id, status) => {
                    ("JOB_STATUS_CHANGE", json!({ "id": id, "status": status.as_str() }))
                }
                JobEvent::Ready(r) => ("BLOCK_JOB_READY", report(r)),
                JobEvent::Completed(r, error) => {
                    let mut data = report(r);
                    if let Some(error) = error {
                        data["error"] = error.into();
                    }
                    ("BLOCK_JOB_COMPLETED", data)
                }
                JobEvent::Cancelled(r) => ("BLOCK_JOB_CANCELLED", report(r)),
                JobEvent::Pending(kind, id) => {
                    ("BLOCK_JOB_PENDING", json!({ "type": kind.as_str(), "id": id }))
                }
                JobEvent::Error { id, read, action } => {
                    let action = match action {
                        ErrorAction::Ignore => "ignore",
                        ErrorAction::Report => "report",
                        ErrorAction::Stop => "stop",
                    };
                    let operation = if read { "read" } else { "write" };
                    ("BLOCK_JOB_ERROR", json!({ "device": id, "operation": operation, "action": action }))
                }
            };
            self.emit(name, data);
        }
    }

    /// The name of the drive right on `node`, if there is one that has a name.
    pub fn drive_of(&self, node: &Arc<Node>) -> Option<&str> {
        let is_it = |n: Arc<Node>| Arc::ptr_eq(&n, node);
        let mut named = self.drives.iter().filter(|d| !d.name().is_empty());
        named.find(|d| d.handle.node().is_some_and(is_it)).map(|d| d.name())
    }

    /// The drive on `node`, or the node, as messages name it.
    pub fn disk_name(&self, node: &Arc<Node>) -> String {
        self.drive_of(node).unwrap_or(&node.name).to_string()
    }

    /// Fails when a job uses `node` in a way that does not go with other changes of it.
    pub fn check_idle(&self, node: &Arc<Node>) -> Result<()> {
        self.jobs.check_free(node, &self.disk_name(node))
    }

    /// The same, and fails when it is some image's backing file. QEMU names what came last.
    pub fn check_alone(&self, node: &Arc<Node>) -> Result<()> {
        // A commit that is over has made it that.
        let after = self.jobs.user_of(node) == Some((Kind::Commit, true));
        let above = self.graph.image_above(node);
        if above.is_none() || !after {
            self.check_idle(node)?;
        }
        match above {
            Some(above) => {
                let (name, above) = (self.disk_name(node), &above.name);
                bail!("Node '{name}' is busy: node is used as backing hd of '{above}'")
            }
            None => Ok(()),
        }
    }

    /// True when neither a node nor a job needs `node` for something: only disks are on it, if anybody.
    pub fn is_root(&self, node: &Arc<Node>) -> bool {
        let by_node = |p: &Parent| matches!(p, Parent::Node(..));
        self.jobs.user_of(node).is_none() && !self.graph.parents(node).iter().any(by_node)
    }

    /// Whether a job uses `node`.
    pub fn has_job(&self, node: &Arc<Node>) -> bool {
        self.jobs.user_of(node).is_some()
    }
}
