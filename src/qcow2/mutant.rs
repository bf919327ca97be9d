//! Deliberate breakage, so that the tests can show that they would notice.
//!
//! Each mutant is a bug that another qcow2 driver has had, or that this one could get. It is chosen
//! per image, and only in builds with debug assertions: in a release build no mutant exists, and
//! the compiler removes every question for one.

/// A way to break the driver; the variant says what goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A cluster is entered into its L2 table before its data are written.
    LinkBeforeData,
    /// No sync between data and refcounts on one side and pointers on the other.
    NoBarrier,
    /// A freed cluster's refcount is lowered, and it is allocated again, at once.
    EarlyFree,
    /// Freed clusters do not wait for requests that are still at them.
    NoGrace,
    /// A freed cluster is punched after it became allocatable.
    LatePunch,
    /// Overlapping allocations do not wait for each other.
    NoWait,
    /// A moved L1 table is named by the header, but only changed sectors of it are written.
    HalfMovedTable,
    /// Refcount-table entries are written before the blocks they point to.
    TableBeforeBlock,
    /// Refcount pages are written after the pointers.
    RefcountsLast,
    /// A table gets a used cluster without it being zeroed.
    DirtyTable,
    /// Data around a write to a new cluster are not copied.
    NoCopy,
    /// Growing does not clear what was behind the old end.
    StaleGrowth,
    /// A write in place that had to make the file longer goes where it looked before that.
    StaleLookup,
    /// A write that ends in a unit that holds data copies the rest of it and writes that back.
    WriteBack,
    /// A moved L1 table is named by the header before it is on stable storage, if a flush came in
    /// between.
    MovedUnsynced,
    /// Stored bitmaps are not marked as in use before the image is written to.
    BitmapNotInUse,
    /// The header names a bitmap directory that is not on stable storage yet.
    DirectoryFirst,
}
