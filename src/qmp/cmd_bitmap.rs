//! Dirty bitmaps: `block-dirty-bitmap-*`, alone and as parts of a transaction.
//!
//! Owns: the commands' form, QEMU's texts, and how each is undone. Never: bits, images. Threads:
//! control. Locks: none.

use super::cmd_blockdev::find_node;
use super::schema::Cx;
use crate::block::bitmap::{Bitmap, Refuse};
use crate::block::drive::Drive;
use crate::block::node::Node;
use crate::error::{Error, Result};
use crate::{bail, commands, wire_alternate, wire_struct};
use std::sync::Arc;

commands! {
    /// Dirty bitmaps.
    pub static BITMAP;

    /// Begins to note what is written to a node.
    "block-dirty-bitmap-add" => bitmap_add(BlockDirtyBitmapAdd) -> ();

    /// Removes a bitmap, also from the image that it is stored in.
    "block-dirty-bitmap-remove" => bitmap_remove(BlockDirtyBitmap) -> ();

    /// Forgets what was written up to now.
    "block-dirty-bitmap-clear" => bitmap_clear(BlockDirtyBitmap) -> ();

    /// Goes on noting what is written.
    "block-dirty-bitmap-enable" => bitmap_enable(BlockDirtyBitmap) -> ();

    /// Notes nothing from now on; what was noted stays.
    "block-dirty-bitmap-disable" => bitmap_disable(BlockDirtyBitmap) -> ();

    /// Adds to a bitmap what others have. Granularities may differ.
    "block-dirty-bitmap-merge" => bitmap_merge(BlockDirtyBitmapMerge) -> ();
}

wire_struct! {
    /// A bitmap.
    pub struct BlockDirtyBitmap {
        /// The node, or the drive.
        node: String,
        /// The bitmap's name.
        name: String,
    }
}

wire_struct! {
    /// A new bitmap.
    pub struct BlockDirtyBitmapAdd {
        /// The node, or the drive.
        node: String,
        /// Its name, unique on the node; 1023 bytes at most.
        name: String,
        /// Bytes that one bit stands for: a power of two from 512 on. By default the cluster size of
        /// the image, but at least 4 KiB and at most 64 KiB.
        granularity: Option<u32>,
        /// It is stored in the image (qcow2) when that is closed.
        persistent: Option<bool>,
        /// It does not note what is written until `block-dirty-bitmap-enable`.
        disabled: Option<bool>,
    }
}

wire_struct! {
    /// What is added to which bitmap.
    pub struct BlockDirtyBitmapMerge {
        /// The node, or the drive, of the target.
        node: String,
        /// The name of the bitmap that grows.
        target: String,
        /// The bitmaps that are added, which stay.
        bitmaps: Vec<BlockDirtyBitmapOrStr>,
    }
}

wire_alternate! {
    /// A bitmap of the same node, by its name, or of any node.
    pub enum BlockDirtyBitmapOrStr {
        /// Of the same node.
        Local(String),
        /// Of any node.
        External(BlockDirtyBitmap),
    }
}

/// One of these operations, its nodes known, its bitmaps not yet looked for.
pub(super) enum Step {
    /// A new one. `shown`: the name of the node or of its drive, for messages.
    Add { node: Arc<Node>, args: BlockDirtyBitmapAdd, shown: String },
    /// Away with it.
    Remove(Arc<Node>, String),
    /// Nothing is dirty any more.
    Clear(Arc<Node>, String),
    /// Whether it notes what is written.
    Enable(Arc<Node>, String, bool),
    /// Into the first, of that name, go the others.
    Merge(Arc<Node>, String, Vec<(Arc<Node>, String)>),
}

/// What undoes a step.
pub(super) enum Undo {
    Added(Arc<Node>, Arc<Bitmap>),
    /// Nothing was done yet but to reserve it.
    Removed(Arc<Node>, Arc<Bitmap>),
    Content(Arc<Bitmap>, Arc<Bitmap>),
    Enabled(Arc<Bitmap>, bool),
}

fn find(node: &Node, name: &str, refuse: Refuse) -> Result<Arc<Bitmap>> {
    let Some(bitmap) = node.find_bitmap(name) else { bail!("Dirty bitmap '{name}' not found") };
    bitmap.check(refuse)?;
    Ok(bitmap)
}

/// The granularity of a bitmap that none was asked for.
fn default_granularity(node: &Node) -> u32 {
    match node.driver.info().cluster_size {
        // At most 64 KiB.
        Some(size) if size > 0 => size.clamp(4096, 65536) as u32,
        _ => 65536,
    }
}

fn add(node: &Arc<Node>, args: &BlockDirtyBitmapAdd, shown: &str) -> Result<Arc<Bitmap>> {
    let granularity = args.granularity.unwrap_or_else(|| default_granularity(node));
    if granularity < 512 || !granularity.is_power_of_two() {
        bail!("Granularity must be power of 2 and at least 512");
    }
    let persistent = args.persistent.unwrap_or(false);
    if persistent {
        let Some(stored) = node.driver.stored_bitmaps() else {
            bail!("Can't store persistent bitmaps to {shown}: Operation not supported");
        };
        if node.find_bitmap(&args.name).is_some() {
            bail!("Bitmap already exists: {}", args.name);
        }
        stored.can_store(&args.name, granularity.into()).map_err(|e| {
            Error::from(e)
                .context(format_args!("Can't make bitmap '{}' persistent in '{shown}': ", args.name))
        })?;
    }
    let bitmap = Bitmap::new(Some(&args.name), granularity, node.len())?;
    bitmap.set_enabled(!args.disabled.unwrap_or(false));
    bitmap.set_persistent(persistent);
    node.insert_bitmap(bitmap.clone())?;
    Ok(bitmap)
}

/// The target and the sources of a merge, all of them usable.
fn merged(
    node: &Node,
    target: &str,
    from: &[(Arc<Node>, String)],
) -> Result<(Arc<Bitmap>, Vec<Arc<Bitmap>>)> {
    let Some(into) = node.find_bitmap(target) else { bail!("Dirty bitmap '{target}' not found") };
    let mut sources = Vec::new();
    for (node, name) in from {
        let Some(source) = node.find_bitmap(name) else { bail!("Dirty bitmap '{name}' not found") };
        into.check(Refuse::Change)?;
        source.check(Refuse::Busy)?;
        if source.len() != into.len() {
            bail!(
                "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
                into.len(),
                source.len()
            );
        }
        sources.push(source);
    }
    Ok((into, sources))
}

impl Step {
    /// Does it, as far as it can be undone.
    pub fn run(&self) -> Result<Undo> {
        match self {
            Step::Add { node, args, shown } => Ok(Undo::Added(node.clone(), add(node, args, shown)?)),
            Step::Remove(node, name) => {
                let bitmap = find(node, name, Refuse::Remove)?;
                bitmap.set_busy(true);
                Ok(Undo::Removed(node.clone(), bitmap))
            }
            Step::Clear(node, name) => {
                let bitmap = find(node, name, Refuse::Change)?;
                let before = bitmap.copy()?;
                bitmap.clear_all();
                Ok(Undo::Content(bitmap, before))
            }
            Step::Enable(node, name, on) => {
                let bitmap = find(node, name, Refuse::Busy)?;
                let before = bitmap.enabled();
                bitmap.set_enabled(*on);
                Ok(Undo::Enabled(bitmap, before))
            }
            Step::Merge(node, target, from) => {
                let (into, sources) = merged(node, target, from)?;
                let before = into.copy()?;
                sources.iter().for_each(|s| into.merge(s));
                Ok(Undo::Content(into, before))
            }
        }
    }

    /// It makes a bitmap of that name.
    pub fn adds(&self, to: &Arc<Node>, name: &str) -> bool {
        matches!(self, Step::Add { node, args, .. } if Arc::ptr_eq(node, to) && args.name == name)
    }

    /// The node whose users wait.
    pub fn node(&self) -> &Arc<Node> {
        match self {
            Step::Add { node, .. }
            | Step::Remove(node, _)
            | Step::Clear(node, _)
            | Step::Enable(node, ..)
            | Step::Merge(node, ..) => node,
        }
    }
}

/// Takes a bitmap away, from the image first.
fn remove(node: &Node, bitmap: &Arc<Bitmap>) -> Result<()> {
    if bitmap.persistent()
        && let (Some(stored), Some(name)) = (node.driver.stored_bitmaps(), bitmap.name())
    {
        stored.remove_stored(name)?;
    }
    node.remove_bitmap(bitmap);
    Ok(())
}

impl Undo {
    /// Something else failed: makes it undone, while the guests still wait.
    pub fn undo(self) {
        match self {
            Undo::Added(node, bitmap) => node.remove_bitmap(&bitmap),
            Undo::Removed(_, bitmap) => bitmap.set_busy(false),
            Undo::Content(bitmap, before) => {
                // Nobody writes meanwhile.
                bitmap.clear_all();
                bitmap.merge(&before);
            }
            Undo::Enabled(bitmap, before) => bitmap.set_enabled(before),
        }
    }

    /// All is well: does what could not be undone.
    pub fn keep(self) {
        if let Undo::Removed(node, bitmap) = self
            && let Err(e) = remove(&node, &bitmap)
        {
            let name = bitmap.name().unwrap_or_default();
            log::error!("bitmap '{name}' of node '{}' is not removed: {e}", node.name);
            bitmap.set_busy(false);
        }
    }
}

/// How a node is looked for: for a part of a transaction, a drive has what it will have.
pub(super) type Look<'a> = &'a dyn Fn(&Cx, &str) -> Result<Arc<Node>>;

/// A node or a drive's, as most of these commands look for it.
fn known(cx: &Cx, name: &str, look: Look) -> Result<Arc<Node>> {
    look(cx, name).map_err(|_| Error::new(format!("Node '{name}' not found")))
}

/// How a command alone looks for a node.
pub(super) fn now(cx: &Cx, name: &str) -> Result<Arc<Node>> {
    find_node(cx, Some(name), Some(name))
}

/// `block-dirty-bitmap-add` as a step.
pub(super) fn plan_add(cx: &Cx, args: BlockDirtyBitmapAdd, look: Look) -> Result<Step> {
    if args.name.is_empty() {
        bail!("Bitmap name cannot be empty");
    }
    let node = look(cx, &args.node)?;
    let on_it = |d: &&Drive| d.handle.node().is_some_and(|n| Arc::ptr_eq(&n, &node));
    let drive = cx.vm.drives.iter().find(on_it).map(|d| d.name().to_string());
    let shown = drive.filter(|d| !d.is_empty()).unwrap_or_else(|| node.name.clone());
    Ok(Step::Add { node, args, shown })
}

/// `block-dirty-bitmap-remove` as a step.
pub(super) fn plan_remove(cx: &Cx, args: BlockDirtyBitmap, look: Look) -> Result<Step> {
    Ok(Step::Remove(known(cx, &args.node, look)?, args.name))
}

/// `block-dirty-bitmap-clear` as a step.
pub(super) fn plan_clear(cx: &Cx, args: BlockDirtyBitmap, look: Look) -> Result<Step> {
    Ok(Step::Clear(known(cx, &args.node, look)?, args.name))
}

/// `block-dirty-bitmap-enable` and `-disable` as a step.
pub(super) fn plan_enable(cx: &Cx, args: BlockDirtyBitmap, on: bool, look: Look) -> Result<Step> {
    Ok(Step::Enable(known(cx, &args.node, look)?, args.name, on))
}

/// `block-dirty-bitmap-merge` as a step.
pub(super) fn plan_merge(cx: &Cx, args: BlockDirtyBitmapMerge, look: Look) -> Result<Step> {
    let node = known(cx, &args.node, look)?;
    let sources = args.bitmaps.into_iter().map(|source| match source {
        BlockDirtyBitmapOrStr::Local(name) => Ok((node.clone(), name)),
        BlockDirtyBitmapOrStr::External(b) => Ok((known(cx, &b.node, look)?, b.name)),
    });
    Ok(Step::Merge(node.clone(), args.target, sources.collect::<Result<_>>()?))
}

fn bitmap_add(cx: &mut Cx, args: BlockDirtyBitmapAdd) -> Result<()> {
    plan_add(cx, args, &now)?.run().map(drop)
}

fn bitmap_remove(cx: &mut Cx, args: BlockDirtyBitmap) -> Result<()> {
    let node = known(cx, &args.node, &now)?;
    let bitmap = find(&node, &args.name, Refuse::Remove)?;
    remove(&node, &bitmap)
}

fn bitmap_clear(cx: &mut Cx, args: BlockDirtyBitmap) -> Result<()> {
    plan_clear(cx, args, &now)?.run().map(drop)
}

fn bitmap_enable(cx: &mut Cx, args: BlockDirtyBitmap) -> Result<()> {
    plan_enable(cx, args, true, &now)?.run().map(drop)
}

fn bitmap_disable(cx: &mut Cx, args: BlockDirtyBitmap) -> Result<()> {
    plan_enable(cx, args, false, &now)?.run().map(drop)
}

fn bitmap_merge(cx: &mut Cx, args: BlockDirtyBitmapMerge) -> Result<()> {
    plan_merge(cx, args, &now)?.run().map(drop)
}

#[cfg(test)]
#[path = "cmd_bitmap_test.rs"]
mod tests;
