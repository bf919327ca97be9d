//! Moments in the life of a request that a test can name, and who takes note of them.
//!
//! A driver for tests (`blkdebug`) stands below a format and wants to know what the format is
//! doing: it injects an error into "the write of an L2 table", or holds a request there. So formats
//! call [`Node::moment`](super::node::Node::moment) on their `file` child at the moments that
//! QEMU has names for; on every other node that costs one branch.
//!
//! Owns: the names. Never: what happens at a moment. Threads: any. Locks: none.

use crate::wire_enum;
use std::io;

wire_enum! {
    /// A moment in the life of a request, or in that of an image.
    pub enum BlkdebugEvent {
        /// An L1 entry is written.
        "l1_update" L1Update,
        /// Space for a larger L1 table is allocated.
        "l1_grow_alloc_table" L1GrowAllocTable,
        /// The larger L1 table is written.
        "l1_grow_write_table" L1GrowWriteTable,
        /// The header is pointed to the larger L1 table.
        "l1_grow_activate_table" L1GrowActivateTable,
        /// A piece of an L2 table is read.
        "l2_load" L2Load,
        /// A piece of an L2 table is written.
        "l2_update" L2Update,
        /// A compressed cluster is entered into an L2 table.
        "l2_update_compressed" L2UpdateCompressed,
        /// An L2 table that a snapshot shares is read to be copied.
        "l2_alloc_cow_read" L2AllocCowRead,
        /// A new L2 table is written.
        "l2_alloc_write" L2AllocWrite,
        /// Guest data are read.
        "read_aio" ReadAio,
        /// Guest data are read from the backing file.
        "read_backing_aio" ReadBackingAio,
        /// A compressed cluster is read.
        "read_compressed" ReadCompressed,
        /// Guest data are written.
        "write_aio" WriteAio,
        /// A compressed cluster is written.
        "write_compressed" WriteCompressed,
        /// The state of a VM is read.
        "vmstate_load" VmstateLoad,
        /// The state of a VM is written.
        "vmstate_save" VmstateSave,
        /// What is around a write in a new cluster is read.
        "cow_read" CowRead,
        /// What is around a write in a new cluster is written.
        "cow_write" CowWrite,
        /// The refcount table is read.
        "reftable_load" ReftableLoad,
        /// A larger refcount table is made.
        "reftable_grow" ReftableGrow,
        /// The refcount table is written.
        "reftable_update" ReftableUpdate,
        /// A piece of a refcount block is read.
        "refblock_load" RefblockLoad,
        /// A refcount block is written.
        "refblock_update" RefblockUpdate,
        /// A piece of a refcount block is written.
        "refblock_update_part" RefblockUpdatePart,
        /// A refcount block is allocated.
        "refblock_alloc" RefblockAlloc,
        /// A new refcount block is entered into the refcount table.
        "refblock_alloc_hookup" RefblockAllocHookup,
        /// A new refcount block is written.
        "refblock_alloc_write" RefblockAllocWrite,
        /// The refcount blocks for a larger refcount table are written.
        "refblock_alloc_write_blocks" RefblockAllocWriteBlocks,
        /// The larger refcount table is written.
        "refblock_alloc_write_table" RefblockAllocWriteTable,
        /// The header is pointed to the larger refcount table.
        "refblock_alloc_switch_table" RefblockAllocSwitchTable,
        /// Clusters are allocated.
        "cluster_alloc" ClusterAlloc,
        /// Less than a cluster is allocated.
        "cluster_alloc_bytes" ClusterAllocBytes,
        /// Clusters are given up.
        "cluster_free" ClusterFree,
        /// What is held in memory is written back.
        "flush_to_os" FlushToOs,
        /// What is written is made durable.
        "flush_to_disk" FlushToDisk,
        /// The first block of a misaligned write is read.
        "pwritev_rmw_head" PwritevRmwHead,
        /// It was read.
        "pwritev_rmw_after_head" PwritevRmwAfterHead,
        /// The last block of a misaligned write is read.
        "pwritev_rmw_tail" PwritevRmwTail,
        /// It was read.
        "pwritev_rmw_after_tail" PwritevRmwAfterTail,
        /// A write begins.
        "pwritev" Pwritev,
        /// A request to write zeroes begins.
        "pwritev_zero" PwritevZero,
        /// A write is done.
        "pwritev_done" PwritevDone,
        /// A format prepares to empty an image.
        "empty_image_prepare" EmptyImagePrepare,
        /// A smaller L1 table is written.
        "l1_shrink_write_table" L1ShrinkWriteTable,
        /// The L2 tables behind a smaller L1 table are given up.
        "l1_shrink_free_l2_clusters" L1ShrinkFreeL2Clusters,
        /// Copy-on-read writes what it read.
        "cor_write" CorWrite,
        /// Clusters are allocated for preallocation.
        "cluster_alloc_space" ClusterAllocSpace,
        /// The node is opened: happens once.
        "none" None,
    }
}

/// Whether the thread that comes to a moment holds a lock that the control thread may want: then its
/// request must not be held back here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// It holds none.
    Free,
    /// It holds one, until it comes to a moment that says otherwise.
    Held,
    /// Whatever the last moment said.
    AsBefore,
}

/// What a driver for tests does at moments, and the breakpoints that a user sets there.
///
/// Errors are ENOENT (no such event, breakpoint or request).
pub trait Moments: Send + Sync {
    /// It is `event` now; `None`: only the locks have changed. A request that must not be held back
    /// here is at its next moment without a lock.
    fn moment(&self, event: Option<BlkdebugEvent>, locks: Locks);

    /// The next request at the event of that name is held back, under the name `tag`.
    fn set_break(&self, event: &str, tag: &str) -> io::Result<()>;

    /// Takes breakpoints back, and lets the requests go on that they hold.
    fn remove_break(&self, tag: &str) -> io::Result<()>;

    /// Lets a request that is held back go on.
    fn resume(&self, tag: &str) -> io::Result<()>;

    /// Waits until a request is held back under that name, or the node is closed.
    fn wait_break(&self, tag: &str);
}
