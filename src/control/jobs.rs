//! Jobs and the rest of the VM: their events, and the names of disks in their messages.
//!
//! Owns: what QMP calls a job's events. Never: how jobs work (`jobs/` does). Threads: control. Locks:
//! none.

use super::vm::Vm;
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

    /// The name of the drive on `node`, if there is one that has a name.
    pub fn drive_of(&self, node: &Arc<Node>) -> Option<&str> {
        let node = node.clone().skip_implicit();
        let is_it = |n: Arc<Node>| Arc::ptr_eq(&n.skip_implicit(), &node);
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

    /// What a job uses `node` for, if one does.
    pub fn job_on(&self, node: &Arc<Node>) -> Option<Kind> {
        self.jobs.user_of(node)
    }
}
