//! What a node is called: the plain name that would open it again as it is, if there is one, else
//! `json:{…}` with all that matters; and the folder that relative names in its image start from.
//! The rules are QEMU's (bdrv_refresh_filename).
//!
//! Owns: the name that a backing file had when the image's own header led to it. Never: opens
//! anything. Threads: control. Locks: none.

use super::node::Node;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// How an image's header led to its backing file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ByHeader {
    /// What the header says.
    pub name: String,
    /// What the node that was opened is called.
    pub shown: String,
}

/// The names of one node.
pub struct Names {
    /// A plain name, or "".
    pub exact: String,
    /// The options that open it again.
    pub options: Map<String, Value>,
}

impl Names {
    /// The plain name, or `json:{…}`.
    pub fn shown(&self) -> String {
        match self.exact.is_empty() {
            false => self.exact.clone(),
            true => format!("json:{}", Value::Object(self.options.clone())),
        }
    }
}

/// The child whose bytes the node shows, if there is one such.
pub fn primary(node: &Node) -> Option<Arc<Node>> {
    let edge = node.driver.filtered().cloned();
    edge.or_else(|| node.driver.edges().into_iter().find(|e| e.role == "file"))?.node()
}

/// Nodes that one name describes at most. A graph whose nodes have several parents has ways without
/// number: what comes later is called by its node's name.
const MOST: u32 = 2048;

/// All names of the node.
pub fn names(node: &Node) -> Names {
    describe(node, &mut 0)
}

fn describe(node: &Node, count: &mut u32) -> Names {
    *count += 1;
    let filtered = node.filtered();
    if node.options().implicit
        && let Some(below) = &filtered
    {
        return describe(below, count);
    }
    let is_filter = node.driver.filtered().is_some();
    let own = node.driver.own_options();
    let mut plain = own.keys().all(|key| key == "filename");
    let mut options = own;
    options.insert("driver".into(), json!(node.driver.name()));
    let mut file = String::new();
    for edge in node.driver.edges() {
        let below = edge.node();
        if let Some(below) = below.as_ref().filter(|_| *count >= MOST) {
            plain = false;
            put(&mut options, &edge.role, json!(below.name));
            continue;
        }
        let named = below.as_deref().map(|n| describe(n, count));
        if edge.role == "backing" && !is_filter {
            let shown = named.as_ref().map(Names::shown).unwrap_or_default();
            let usual = usual_backing(node);
            // New images get absolute names.
            if shown == usual || (!shown.is_empty() && absolute(&shown) == usual) {
                continue;
            }
            plain = false;
        }
        if let Some(below) = &below
            && edge.role == "file"
            && below.driver.edges().is_empty()
        {
            file = named.as_ref().map(|n| n.exact.clone()).unwrap_or_default();
        }
        let value = named.map_or(Value::Null, |n| Value::Object(n.options));
        put(&mut options, &edge.role, value);
    }
    let special = node.driver.filename();
    let exact = match () {
        () if !special.is_empty() => special,
        () if plain && !is_filter => file,
        () => String::new(),
    };
    Names { exact, options }
}

/// `children.2` goes into the list `children`.
fn put(options: &mut Map<String, Value>, role: &str, value: Value) {
    if let Some((list, number)) = role.split_once('.')
        && number.parse::<u32>().is_ok()
    {
        let list = options.entry(list).or_insert_with(|| json!([]));
        list.as_array_mut().into_iter().for_each(|l| l.push(value.clone()));
    } else {
        options.insert(role.to_string(), value);
    }
}

/// The backing file that the image would have if it were opened without being told: "" for none.
fn usual_backing(node: &Node) -> String {
    let header = node.driver.info().backing_filename.unwrap_or_default();
    match node.by_header() {
        Some(known) if known.name == header => known.shown,
        _ => header,
    }
}

/// The name of a file as it can be found from any folder.
pub fn absolute(name: &str) -> String {
    match std::path::absolute(name) {
        Ok(full) if !name.starts_with("json:") => full.to_string_lossy().into_owned(),
        _ => name.to_string(),
    }
}

/// The plain name of the file whose folder relative names in the node's image start from.
pub fn origin(node: &Node) -> String {
    match primary(node) {
        Some(below) => origin(&below),
        None => node.driver.filename(),
    }
}

#[cfg(test)]
#[path = "filename_test.rs"]
mod tests;
