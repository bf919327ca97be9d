//! From options to nodes: names, what children inherit, who is asked for permission when, and
//! how a backing file that an image names is found.
//!
//! A driver is opened by its [`Open`], which asks the [`Opening`] for its children one by one.
//! From the moment a child is there, its new user takes part in the permission check (an image is
//! locked before its header is read), and whatever was opened on the way is closed again when
//! anything fails. All of this happens before any gate is closed.
//!
//! Formats are never guessed from an image's content: whoever can write to a raw disk could make
//! it look like an image that names any file of the host as its backing file.
//!
//! Owns: the rules. Never: knows a format by name (the [`Env`] does). Threads: control. Locks: none.

use super::driver::{Driver, Perm};
use super::filename::{self, ByHeader};
use super::graph::Graph;
use super::node::{DetectZeroes, Edge, Node, NodeOptions};
use super::perm;
use super::throttle::Group;
use super::yank::Yanks;
use crate::bail;
use crate::error::{Error, Result};
use crate::event::Events;
use serde_json::{Map, Value};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The longest chain of backing files that is opened.
const MAX_CHAIN: usize = 200;

/// The options that every driver has, as given: `None` is inherited, or the default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Common {
    /// `node-name`.
    pub node_name: Option<String>,
    /// `discard`: true for `unmap`.
    pub unmap: Option<bool>,
    /// `cache.direct`.
    pub direct: Option<bool>,
    /// `cache.no-flush`.
    pub no_flush: Option<bool>,
    /// `cache.writeback`.
    pub writeback: Option<bool>,
    /// `read-only`.
    pub read_only: Option<bool>,
    /// `auto-read-only`.
    pub auto_read_only: Option<bool>,
    /// `force-share`.
    pub force_share: Option<bool>,
    /// `detect-zeroes`.
    pub detect_zeroes: Option<DetectZeroes>,
}

/// What a node was asked to be.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// As given, before anything is inherited.
    pub common: Common,
    /// The node that it was defined with, as its child.
    pub owner: Option<String>,
    /// All options as they were given, the driver's own among them; empty when nobody knows.
    pub given: Map<String, Value>,
}

impl Common {
    /// What follows from these options, and those of the node's parent if it was defined with that
    /// (`true`: as its backing file).
    pub(super) fn with_parent(&self, parent: Option<(&NodeOptions, bool)>) -> Result<NodeOptions> {
        let mut common = self.clone();
        if let Some((parent, backing)) = parent {
            common.inherit(parent, backing);
        }
        common.resolve()
    }

    fn resolve(&self) -> Result<NodeOptions> {
        let options = NodeOptions {
            read_only: self.read_only.unwrap_or(false),
            unmap: self.unmap.unwrap_or(false),
            detect_zeroes: self.detect_zeroes.unwrap_or_default(),
            direct: self.direct.unwrap_or(false),
            no_flush: self.no_flush.unwrap_or(false),
            writeback: self.writeback.unwrap_or(true),
            force_share: self.force_share.unwrap_or(false),
            auto_read_only: self.auto_read_only.unwrap_or(false),
            implicit: false,
        };
        if options.force_share && !options.read_only {
            bail!("force-share=on can only be used with read-only images");
        }
        if options.detect_zeroes == DetectZeroes::Unmap && !options.unmap {
            bail!(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap"
            );
        }
        Ok(options)
    }

    /// What a child that is defined inline takes from its parent (QEMU's bdrv_inherited_options).
    fn inherit(&mut self, parent: &NodeOptions, backing: bool) {
        self.direct.get_or_insert(parent.direct);
        self.no_flush.get_or_insert(parent.no_flush);
        self.force_share.get_or_insert(parent.force_share);
        self.read_only.get_or_insert(backing || parent.read_only);
        self.auto_read_only.get_or_insert(!backing && parent.auto_read_only);
        // A format passes on only what its own options allow, so its children may do all.
        self.unmap.get_or_insert(true);
    }
}

/// A node that is to be opened.
pub struct Plan {
    /// Options of every node.
    pub common: Common,
    /// The driver's own.
    pub driver: Box<dyn Open>,
}

/// A child: to be opened, or by its name.
pub enum Child {
    /// Defined inline.
    New(Box<Plan>),
    /// Exists already: a node's name, or a drive's.
    Node(String),
}

/// Where a format gets its backing file.
#[derive(Default)]
pub enum Backing {
    /// The one the image names, if any.
    #[default]
    FromImage,
    /// None, whatever the image says.
    Nothing,
    /// This one.
    Child(Child),
}

/// A driver's options, able to open it.
pub trait Open {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// Opens it, with its children. The error is for the user.
    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>>;
}

/// A file descriptor out of an fd set (`/dev/fdset/N`).
pub struct PassedFd {
    /// A duplicate.
    pub fd: OwnedFd,
    /// Kept as long as the descriptor is used: keeps the set alive.
    pub keep: Option<Box<dyn Send + Sync>>,
}

/// What opening needs from the floors above: they know the formats and the descriptors.
pub trait Env {
    /// The driver `format` with default options on top of `file`; `None`: no such format.
    fn layer(&self, format: &str, file: Child) -> Option<Plan>;

    /// The node that a `json:{…}` file name describes.
    fn parse(&self, options: serde_json::Value) -> Result<Plan>;

    /// The protocol driver `driver` (`file`, `host_device`) on `filename`, with default options; or
    /// the one that the whole name `filename` belongs to, which begins with `driver` and a colon.
    fn protocol(&self, driver: &str, filename: &str) -> Option<Plan>;

    /// The object of that name, if it is a throttle group.
    fn throttle_group(&self, name: &str) -> Option<Arc<Group>> {
        let _ = name;
        None
    }

    /// A duplicate out of the fd set `path` (`/dev/fdset/N`) whose access mode is that of `flags`
    /// (O_RDONLY, O_RDWR), and that has O_DIRECT if `flags` does.
    fn fdset(&self, path: &str, flags: i32) -> Result<PassedFd>;

    /// The bytes of the `secret` object `id`, which is a password.
    fn secret(&self, id: &str) -> Result<Vec<u8>>;

    /// The descriptor that whoever opens the node has passed under that name, for good.
    fn passed(&self, name: &str) -> Result<OwnedFd> {
        bail!("File descriptor named '{name}' has not been found")
    }
}

/// Opens a node and what it holds inline. Nobody uses it yet: attach a handle, or
/// [`own`](Graph::own) it, before anything else is opened or deleted.
pub fn open(graph: &mut Graph, env: &dyn Env, plan: Plan) -> Result<Arc<Node>> {
    open_node(graph, env, plan, None, Vec::new(), 1)
}

/// Notes how `node` was asked for, and what is defined with it: what may change when it is reopened
/// follows from that.
pub fn remember(node: &Arc<Node>, given: &Map<String, Value>) {
    node.set_asked(Asked { given: given.clone(), ..node.asked() });
    for edge in node.driver.edges() {
        // `children.2` is in a list.
        let value = match edge.role.split_once('.') {
            Some((list, n)) => n.parse::<usize>().ok().and_then(|n| given.get(list)?.get(n)),
            None => given.get(&edge.role),
        };
        if let (Some(Value::Object(given)), Some(child)) = (value, edge.node()) {
            remember(&child, given);
        }
    }
}

/// `blockdev-add`: opens a node that stays until it is deleted.
pub fn add(graph: &mut Graph, env: &dyn Env, plan: Plan) -> Result<Arc<Node>> {
    let node = open(graph, env, plan)?;
    graph.own(&node);
    Ok(node)
}

fn open_node(
    graph: &mut Graph,
    env: &dyn Env,
    plan: Plan,
    // Whose child it is, with that one's options, and whether as its backing file.
    parent: Option<(&str, &NodeOptions, bool)>,
    chain: Vec<(u64, u64)>,
    depth: usize,
) -> Result<Arc<Node>> {
    if depth > perm::MAX_DEPTH {
        bail!("the definition is nested more than {} deep", perm::MAX_DEPTH);
    }
    let name = match plan.common.node_name.clone() {
        Some(name) => {
            graph.check_name(&name)?;
            name
        }
        None => graph.auto_name(),
    };
    let options = plan.common.with_parent(parent.map(|(_, options, backing)| (options, backing)))?;
    let asked = Asked { common: plan.common, owner: parent.map(|p| p.0.to_string()), given: Map::new() };
    graph.begin(&name);
    let mut cx = Opening { graph, env, name, options, age: None, chain, depth, by_header: None };
    let opened = plan.driver.open(&mut cx);
    let age = cx.age();
    let Opening { graph, name, options, by_header, .. } = cx;
    graph.end(&name);
    let done = opened.and_then(|driver| {
        let node = Node::new(name.clone(), driver, options);
        node.set_by_header(by_header);
        node.set_asked(asked);
        match graph.insert(node.clone(), age) {
            Ok(()) => Ok(node),
            Err(e) => {
                if let Err(e) = node.driver.close() {
                    log::warn!("closing '{name}' failed: {e}");
                }
                Err(e)
            }
        }
    });
    done.inspect_err(|_| graph.release(&name))
}

/// A node while it is being opened: what its driver's [`Open::open`] works with.
pub struct Opening<'a> {
    graph: &'a mut Graph,
    env: &'a dyn Env,
    name: String,
    /// The node's options. A driver that can only be opened for reading sets `read_only`.
    pub options: NodeOptions,
    age: Option<u64>,
    /// The files below the nodes whose backing chain this node is in.
    chain: Vec<(u64, u64)>,
    /// How many nodes are being opened, this one included.
    depth: usize,
    by_header: Option<ByHeader>,
}

impl Opening<'_> {
    /// The name the node will have.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn age(&mut self) -> u64 {
        let graph = &mut *self.graph;
        *self.age.get_or_insert_with(|| graph.next_age())
    }

    /// Where the driver can post what the control thread is to know.
    pub fn events(&self) -> Option<Events> {
        self.graph.events().cloned()
    }

    /// Where a driver enters that can hang.
    pub fn yanks(&self) -> Yanks {
        self.graph.yanks().clone()
    }

    /// A descriptor of an fd set.
    pub fn fdset(&self, path: &str, flags: i32) -> Result<PassedFd> {
        self.env.fdset(path, flags)
    }

    /// The password that the `secret` object `id` is.
    pub fn secret(&self, id: &str) -> Result<Vec<u8>> {
        self.env.secret(id)
    }

    /// The descriptor that was passed under that name, for good.
    pub fn passed(&self, name: &str) -> Result<OwnedFd> {
        self.env.passed(name)
    }

    /// The throttle group of that name: an object's, or one that a drive is in.
    pub fn throttle_group(&self, name: &str) -> Option<Arc<Group>> {
        self.env.throttle_group(name).or_else(|| self.graph.find_throttle_group(name))
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.graph.find(name).cloned()
    }

    /// Opens or finds a child. `perm` is what this driver does with it, and shares, as long as
    /// nobody uses the driver itself: `wants(edge, (NONE, ALL))`.
    pub fn child(&mut self, role: &str, child: Child, perm: (Perm, Perm)) -> Result<Arc<Edge>> {
        let chain = self.chain.clone();
        self.child_in(role, child, perm, chain)
    }

    fn child_in(
        &mut self,
        role: &str,
        child: Child,
        perm: (Perm, Perm),
        chain: Vec<(u64, u64)>,
    ) -> Result<Arc<Edge>> {
        if role != "file" {
            self.age();
        }
        let node = match child {
            Child::Node(name) => {
                let drive = || {
                    let handle = self.graph.handles().iter().find(|h| h.name() == name)?;
                    handle.node()
                };
                let node = self.graph.find(&name).cloned().or_else(drive);
                let lost = format!("Cannot find device='{name}' nor node-name='{name}'");
                node.ok_or_else(|| Error::new(lost))?
            }
            Child::New(plan) => {
                let parent = (self.name.as_str(), &self.options, role == "backing");
                open_node(self.graph, self.env, *plan, Some(parent), chain, self.depth + 1)?
            }
        };
        if let Some(id) = node.driver.file_id()
            && role == "file"
            && self.chain.contains(&id)
        {
            bail!("the chain of backing files is a loop");
        }
        let shares = if self.options.force_share { Perm::ALL } else { perm.1 };
        let edge = Edge::new(role, Some(node));
        self.graph.hold(&self.name, &edge, (perm.0, shares))?;
        Ok(edge)
    }

    /// The `file` child of a format: it holds the metadata, and is locked from here on. The
    /// driver's `wants` for it is [`for_metadata`](perm::for_metadata) with the same
    /// `writable`, which is `!cx.options.read_only` at this moment.
    pub fn file(&mut self, child: Child) -> Result<Arc<Edge>> {
        let perm = perm::for_metadata((Perm::NONE, Perm::ALL), !self.options.read_only);
        let edge = self.child("file", child, perm)?;
        self.chain.extend(edge.node().and_then(|n| n.driver.file_id()));
        Ok(edge)
    }

    /// An external data file, by the name that an image records: a regular file of the host,
    /// whatever the name looks like, for nobody looks at these names before an image is opened (QEMU
    /// had to learn that: CVE-2024-4467). Unlike a backing file's, a relative name is not relative
    /// to the image, but to the process's directory, as in QEMU.
    pub fn named(&self, name: &str) -> Result<Child> {
        let plan = self.env.protocol("file", name);
        Ok(Child::New(Box::new(plan.ok_or_else(|| Error::new("Unknown driver 'file'"))?)))
    }

    /// The backing file of a format: as `backing` says, else the one that the image in `file`
    /// names. `named`: the header's file name and format.
    pub fn backing(
        &mut self,
        backing: Backing,
        file: &Edge,
        named: Option<(&str, Option<&str>)>,
    ) -> Result<Arc<Edge>> {
        let prefix = "Could not open backing file: ";
        let header = named.map(|(name, _)| name.to_string());
        let by_header = matches!(backing, Backing::FromImage);
        let child = match (backing, named) {
            (Backing::Child(child), _) => child,
            (Backing::Nothing, _) | (Backing::FromImage, None) => {
                return Ok(Edge::new("backing", None));
            }
            (Backing::FromImage, Some((name, format))) => {
                self.named_backing(file, name, format).map_err(|e| e.context(prefix))?
            }
        };
        if self.chain.len() >= MAX_CHAIN {
            bail!("{prefix}the chain of backing files is longer than {MAX_CHAIN}");
        }
        let perm = perm::for_backing((Perm::NONE, Perm::ALL));
        let chain = self.chain.clone();
        let edge = self.child_in("backing", child, perm, chain).map_err(|e| e.context(prefix))?;
        if let (true, Some(name), Some(node)) = (by_header, header, edge.node()) {
            self.by_header = Some(ByHeader { name, shown: filename::names(&node).shown() });
        }
        Ok(edge)
    }

    fn named_backing(&self, file: &Edge, name: &str, format: Option<&str>) -> Result<Child> {
        let own = file.node().map(|n| filename::origin(&n)).unwrap_or_default();
        let path = combine(&own, name);
        let Some(format) = format else {
            bail!(
                "the image does not record the format of its backing file '{name}', and formats \
                 are not guessed: give 'backing', or record it with qemu-img rebase -u -F"
            );
        };
        let protocol = from_file_name(self.env, &path)?;
        if protocol.driver.name() == format {
            // QEMU records the format "file" for a raw file at times; json: may name a format.
            return Ok(Child::New(Box::new(protocol)));
        }
        match self.env.layer(format, Child::New(Box::new(protocol))) {
            Some(plan) => Ok(Child::New(Box::new(plan))),
            None => bail!("Unknown driver '{format}'"),
        }
    }
}

/// Opens a file name as a human or an image header writes it: a path, `file:PATH`, `json:{…}`.
pub fn from_file_name(env: &dyn Env, name: &str) -> Result<Plan> {
    if let Some(json) = name.strip_prefix("json:") {
        let options = serde_json::from_str(json)
            .map_err(|e| Error::new(format!("Could not parse the JSON options: {e}")))?;
        return env.parse(options);
    }
    let path = name.strip_prefix("file:").unwrap_or(name);
    if path.len() == name.len()
        && let Some(protocol) = protocol_of(name)
    {
        let unknown = || Error::new(format!("Unknown protocol '{protocol}'"));
        return env.protocol(protocol, name).ok_or_else(unknown);
    }
    let driver = if is_device(path) { "host_device" } else { "file" };
    env.protocol(driver, path).ok_or_else(|| Error::new(format!("Unknown driver '{driver}'")))
}

/// `nbd` of `nbd://host/`: what stands before the first colon, if no slash comes earlier.
fn protocol_of(name: &str) -> Option<&str> {
    let colon = name.find(':')?;
    (!name[..colon].contains('/')).then(|| &name[..colon])
}

fn is_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// The full name of the backing file `name` of the image `own` (QEMU's path_combine).
pub fn combine(own: &str, name: &str) -> String {
    if name.starts_with('/') || protocol_of(name).is_some() {
        return name.to_string();
    }
    let dir = own.rfind('/').map_or("", |slash| &own[..=slash]);
    format!("{dir}{name}")
}

#[cfg(test)]
#[path = "open_test.rs"]
mod tests;
