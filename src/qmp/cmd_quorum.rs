//! `x-blockdev-change`: children of a quorum come and go.
//!
//! Owns: its form and QEMU's texts. Never: what a driver makes of it. Threads: control. Locks: none.

use super::cmd_blockdev::find_node;
use super::schema::Cx;
use crate::error::{Error, Result};
use crate::{bail, commands};

commands! {
    /// Changes of a quorum.
    pub static QUORUM;

    /// Adds `node`, which nobody else uses, to the children of `parent`, or takes `child` away;
    /// exactly one of the two. A new child is called `children.N`, with a number that no child had
    /// before; its contents are the user's affair (`rewrite-corrupted` corrects what is read).
    "x-blockdev-change" => blockdev_change {
        /// The node, or drive, whose children change.
        parent: String,
        /// The child's name below it: `children.0`.
        child: Option<String>,
        /// The new child's node name.
        node: Option<String>,
    } -> ();
}

fn blockdev_change(cx: &mut Cx, parent: String, child: Option<String>, node: Option<String>) -> Result<()> {
    let above = find_node(cx, Some(&parent), Some(&parent))?;
    cx.vm.check_idle(&above)?;
    match (child, node) {
        (Some(_), Some(_)) => bail!("The parameters child and node are in conflict"),
        (None, None) => bail!("Either child or node must be specified"),
        (Some(child), None) => {
            // QEMU's text has the parent as it was given.
            if !above.driver.edges().iter().any(|e| e.role == child && e.node().is_some()) {
                bail!("Node '{parent}' does not have child '{child}'");
            }
            cx.vm.graph.remove_child(&above, &child)
        }
        (None, Some(name)) => {
            let lost = || Error::new(format!("Node '{name}' not found"));
            let node = cx.vm.graph.find(&name).cloned().ok_or_else(lost)?;
            cx.vm.graph.add_child(&above, &node)
        }
    }
}

#[cfg(test)]
#[path = "cmd_quorum_test.rs"]
mod tests;
