//! What is found wrong with an image while it is in use: how it is said, and what follows.
//!
//! Owns: the error that means "corrupt", the corrupt bit, who is told. Never: looks for anything
//! wrong itself. Threads: any. Locks: `meta`.
//!
//! An image that is written to is marked in its header at once and not written any more, by nobody,
//! until it was checked and repaired; reading goes on. Of an image that is only read a broken part
//! cannot be read, and that is all.

use super::Qcow2;
use super::header::INCOMPAT_CORRUPT;
use super::meta::{Meta, write_all};
use super::types::{OFFSET_MASK, REFTABLE_MASK};
use std::io;
use std::ops::Range;

/// Told when an image is found corrupt while in use: at most once that it may be read only, and
/// once that it may not be written any more.
pub type OnCorrupt = Box<dyn Fn(&Corruption) + Send + Sync>;

/// What QMP's `BLOCK_IMAGE_CORRUPTED` says, but for the names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What is wrong, for people.
    pub msg: String,
    /// Where in the image file, in bytes, if it is about a place: offset and length.
    pub at: Option<(u64, u64)>,
    /// The image is marked corrupt, and nothing is written any more.
    pub fatal: bool,
}

/// What is wrong with an image: the inside of an [`io::Error`] from [`corrupt`].
#[derive(Clone, Debug)]
pub(super) struct Broken {
    msg: String,
    at: Option<(u64, u64)>,
}

impl Broken {
    /// With the place in the file that it is about.
    pub(super) fn at(msg: String, place: &Range<u64>) -> Broken {
        Broken { msg, at: Some((place.start, place.end - place.start)) }
    }
}

impl<T: Into<String>> From<T> for Broken {
    fn from(msg: T) -> Broken {
        Broken { msg: msg.into(), at: None }
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.msg)
    }
}

impl std::error::Error for Broken {}

/// An error that says that the image is corrupt; [`Qcow2::judge`] acts on it.
pub(super) fn corrupt(why: impl Into<Broken>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl Meta {
    /// The error for a write of guest data to `place` in the image file, where metadata are.
    pub(super) fn overlap(&self, place: &Range<u64>) -> Broken {
        let what = self.geo.clusters(place.start, place.end - place.start).find_map(|k| self.what_is(k));
        let what = what.unwrap_or("metadata");
        Broken::at(format!("Preventing invalid write on metadata (overlaps with {what})"), place)
    }

    /// QEMU's name for the metadata in cluster `k`.
    fn what_is(&self, k: u64) -> Option<&'static str> {
        let bits = self.geo.cluster_bits;
        let within = |offset: u64, len: u64| len > 0 && self.geo.clusters(offset, len).contains(&k);
        let h = &self.header;
        let named =
            |table: &[u64], mask: u64| table.iter().any(|e| *e & mask != 0 && (*e & mask) >> bits == k);
        if k == 0 {
            Some("qcow2_header")
        } else if within(h.l1_offset, u64::from(h.l1_size) * 8) {
            Some("active L1 table")
        } else if within(h.reftable_offset, u64::from(h.reftable_clusters) << bits) {
            Some("refcount table")
        } else if named(&self.l1.entries, OFFSET_MASK) {
            Some("active L2 table")
        } else if named(&self.reftable.entries, REFTABLE_MASK) {
            Some("refcount block")
        } else if h.snapshots > 0 && h.snapshots_offset >> bits == k {
            Some("snapshot table")
        } else {
            self.tables.contains(&k).then_some("inactive L1 table")
        }
    }
}

impl Qcow2 {
    /// Turns an error that says "corrupt" into the corrupt bit and EIO; call with no lock held.
    pub(super) fn judge<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|e| match e.get_ref().and_then(|inner| inner.downcast_ref::<Broken>()) {
            Some(why) => self.mark_corrupt(why),
            None => e,
        })
    }

    /// The image is broken: says so in its header at once, and lets nobody write any more.
    /// Answers EIO for the request that found it.
    pub(super) fn mark_corrupt(&self, why: &Broken) -> io::Error {
        let eio = io::Error::from_raw_os_error(libc::EIO);
        let mut meta = self.lock();
        let fatal = !self.read_only();
        if meta.signaled && (!fatal || meta.header.incompatible & INCOMPAT_CORRUPT != 0) {
            return eio;
        }
        meta.signaled = true;
        if fatal {
            log::error!(
                "qcow2: Marking image as corrupt: {why}; further corruption events will be suppressed"
            );
            meta.corrupt = true;
            meta.header.incompatible |= INCOMPAT_CORRUPT;
            if meta.geo.v3 {
                // Only this bit: other fields may name what is not on disk yet.
                let mut sector = meta.sector.clone();
                sector[79] |= INCOMPAT_CORRUPT as u8;
                let done = self.file().and_then(|f| {
                    f.locked();
                    write_all(&f, 0, &sector)?;
                    f.flush()
                });
                match done {
                    Ok(()) => meta.sector = sector,
                    Err(e) => log::error!("qcow2: the corrupt bit could not be written: {e}"),
                }
            }
        } else {
            log::error!(
                "qcow2: Image is corrupt: {why}; further non-fatal corruption events will be suppressed"
            );
        }
        drop(meta);
        if let Some(tell) = &self.on_corrupt {
            tell(&Corruption { msg: why.msg.clone(), at: why.at, fatal });
        }
        eio
    }
}
