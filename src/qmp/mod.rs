//! QMP: bytes to commands and back.

pub mod client;
pub mod dispatch;
pub mod event;
pub mod fds;
pub mod introspect;
mod oob;
pub mod schema;
pub mod server;
pub mod wire;

mod cmd_backup;
mod cmd_bitmap;
mod cmd_blockdev;
mod cmd_commit;
mod cmd_core;
mod cmd_create;
mod cmd_device;
mod cmd_fd;
mod cmd_hmp;
mod cmd_job;
mod cmd_machine;
mod cmd_medium;
mod cmd_mirror;
mod cmd_nbd;
mod cmd_object;
mod cmd_oob;
mod cmd_passwd;
mod cmd_query_block;
mod cmd_quorum;
mod cmd_snapshot;
mod cmd_stream;
mod cmd_throttle;
mod cmd_transaction;
mod job_options;
mod query_block_types;

/// Every command, one table a file.
static TABLES: &[&[schema::Command]] = &[
    cmd_core::CORE,
    cmd_fd::FD,
    cmd_machine::MACHINE,
    cmd_blockdev::BLOCKDEV,
    cmd_query_block::QUERY_BLOCK,
    cmd_quorum::QUORUM,
    cmd_oob::OOB,
    cmd_hmp::HMP,
    cmd_snapshot::SNAPSHOT,
    cmd_bitmap::BITMAP,
    cmd_transaction::TRANSACTION,
    cmd_throttle::THROTTLE,
    cmd_object::OBJECT,
    cmd_passwd::PASSWD,
    cmd_job::JOB,
    cmd_stream::STREAM,
    cmd_commit::COMMIT,
    cmd_create::CREATE,
    cmd_nbd::NBD,
    cmd_backup::BACKUP,
    cmd_mirror::MIRROR,
    cmd_medium::MEDIUM,
    cmd_device::DEVICE,
];
