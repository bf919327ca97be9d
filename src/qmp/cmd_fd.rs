//! File descriptors that come with a request: `getfd`, `closefd`, `add-fd`, `remove-fd`,
//! `query-fdsets`.
//!
//! Owns: their QMP form. Never: who uses a descriptor later. Threads: control. Locks: none.

use super::schema::Cx;
use crate::error::{Error, Result};
use crate::{commands, wire_struct};
use std::os::fd::AsRawFd;

commands! {
    /// File descriptors.
    pub static FD;

    /// Takes the file descriptor that came with the request (SCM_RIGHTS) and keeps it under a
    /// name, for this monitor, until `closefd` or until a command takes it by that name. A
    /// descriptor that has the name already is closed and replaced.
    "getfd" => getfd {
        /// The name. It must not begin with a digit.
        fdname: String,
    } -> ();

    /// Closes a file descriptor that `getfd` gave a name.
    "closefd" => closefd {
        /// The name.
        fdname: String,
    } -> ();

    /// Takes the file descriptor that came with the request (SCM_RIGHTS) and adds it to an fd
    /// set. Wherever a file name is asked for, `/dev/fdset/N` stands for a duplicate of the
    /// newest member of set N with the access mode that is needed.
    "add-fd" => add_fd {
        /// The set's number. Without it a new set is made, with the lowest free number.
        "fdset-id" fdset_id: Option<i64>,
        /// Free text that `query-fdsets` shows.
        opaque: Option<String>,
    } -> AddfdInfo;

    /// Closes one file descriptor of an fd set, or all of them. Duplicates in use stay open, and
    /// the set is listed until they are closed.
    "remove-fd" => remove_fd {
        /// The set's number.
        "fdset-id" fdset_id: i64,
        /// The descriptor's number as `add-fd` returned it. Without it: all of the set.
        fd: Option<i64>,
    } -> ();

    /// The fd sets, by descending number, and their members in the order in which they were
    /// added.
    "query-fdsets" => query_fdsets {} -> Vec<FdsetInfo>;
}

wire_struct! {
    /// Where `add-fd` put a descriptor.
    pub struct AddfdInfo {
        /// The set's number.
        "fdset-id" fdset_id: i64,
        /// The descriptor's number in this process.
        fd: i64,
    }
}

wire_struct! {
    /// An fd set.
    pub struct FdsetInfo {
        /// Its number.
        "fdset-id" fdset_id: i64,
        /// Its members.
        fds: Vec<FdsetFdInfo>,
    }
}

wire_struct! {
    /// A member of an fd set.
    pub struct FdsetFdInfo {
        /// The descriptor's number in this process.
        fd: i64,
        /// The text that was given with it.
        opaque: Option<String>,
    }
}

fn getfd(cx: &mut Cx, fdname: String) -> Result<()> {
    let fd = cx.conn.take_fd()?;
    if fdname.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Error::new("Parameter 'fdname' expects a name not starting with a digit"));
    }
    cx.conn.name_fd(fdname, fd);
    Ok(())
}

fn closefd(cx: &mut Cx, fdname: String) -> Result<()> {
    cx.conn.close_named(&fdname)
}

fn add_fd(cx: &mut Cx, fdset_id: Option<i64>, opaque: Option<String>) -> Result<AddfdInfo> {
    let fd = cx.conn.take_fd()?;
    let (fdset_id, fd) = cx.vm.fds.add(fd, fdset_id, opaque)?;
    Ok(AddfdInfo { fdset_id, fd: fd.into() })
}

fn remove_fd(cx: &mut Cx, fdset_id: i64, fd: Option<i64>) -> Result<()> {
    cx.vm.fds.remove(fdset_id, fd)
}

fn query_fdsets(cx: &mut Cx) -> Result<Vec<FdsetInfo>> {
    let sets = cx.vm.fds.list().iter();
    Ok(sets
        .map(|set| FdsetInfo {
            fdset_id: set.id,
            fds: set
                .fds
                .iter()
                .map(|m| FdsetFdInfo { fd: m.fd.as_raw_fd().into(), opaque: m.opaque.clone() })
                .collect(),
        })
        .collect())
}
