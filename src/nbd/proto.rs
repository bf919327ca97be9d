//! The NBD protocol's numbers, and requests and replies as bytes.
//!
//! Source: the protocol document of the NetworkBlockDevice project (`doc/proto.md`); names are
//! its names without `NBD_`. All numbers travel big-endian. Owns: nothing. Never: reads or writes
//! a socket. Threads: any. Locks: none.

/// `NBDMAGIC`, the first bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle; also before each option.
pub const OPTS_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag (both sides): fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag (both sides): no 124 zeroes after OPT_EXPORT_NAME's answer.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Transmission flags.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_PLATFORM: u32 = 0x8000_0004;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    pub const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Set in every error.
    pub const ERR: u32 = 0x8000_0000;
}

/// What OPT_INFO and OPT_GO tell.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Requests.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks of structured replies.
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
    pub const ERROR_OFFSET: u16 = 0x8002;
    /// Set in every error.
    pub const ERR: u16 = 0x8000;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
}

/// `base:allocation`: nothing is allocated there.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: it reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// `qemu:dirty-bitmap:`: it has been written.
pub const STATE_DIRTY: u32 = 1;

/// Names may not be longer, in bytes.
pub const MAX_STRING: usize = 4096;
/// Bytes of a request's payload, or of a simple reply's, that everybody takes.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `cmd_flag::*`
    pub flags: u16,
    /// `cmd::*`
    pub kind: u16,
    /// The client's name for it, opaque.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

impl Request {
    /// Bytes of a request's header.
    pub const SIZE: usize = 28;

    /// As it travels.
    pub fn bytes(&self) -> [u8; Request::SIZE] {
        let mut out = [0; Request::SIZE];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// From its bytes; `None` when they do not begin as a request does.
    pub fn parse(b: &[u8; Request::SIZE]) -> Option<Request> {
        (be32(b, 0) == REQUEST_MAGIC).then(|| Request {
            flags: be16(b, 4),
            kind: be16(b, 6),
            cookie: be64(b, 8),
            offset: be64(b, 16),
            len: be32(b, 24),
        })
    }
}

/// A simple reply without data.
pub fn simple_reply(cookie: u64, error: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The head of a chunk with `len` bytes of payload.
pub fn chunk_head(cookie: u64, flags: u16, kind: u16, len: u32) -> [u8; 20] {
    let mut out = [0; 20];
    out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&len.to_be_bytes());
    out
}

/// The 16-bit number at byte `at`.
///
/// # Panics
/// When there are no two bytes, as the others below.
pub fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

/// The 32-bit number at byte `at`.
pub fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The 64-bit number at byte `at`.
pub fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// Takes numbers and strings from the front of an option's data; `None` when they are not there.
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| be16(b, 0))
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|b| be32(b, 0))
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|b| be64(b, 0))
    }

    /// A string after its length.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()?;
        self.take(n as usize)
    }
}

/// An error number as the protocol has it; what it has no number for is an I/O error.
pub fn error_code(e: &std::io::Error) -> u32 {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EROFS | libc::EACCES) => EPERM,
        Some(libc::ENOMEM) => ENOMEM,
        Some(libc::EINVAL) => EINVAL,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ENOSPC,
        Some(libc::EOVERFLOW) => EOVERFLOW,
        Some(libc::ENOTSUP) => ENOTSUP,
        Some(libc::ESHUTDOWN) => ESHUTDOWN,
        _ => EIO,
    }
}

/// The error that a number in a reply means; what the protocol does not have is EINVAL.
pub fn error_of(code: u32) -> std::io::Error {
    let known = [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];
    let code = if known.contains(&code) { code } else { EINVAL };
    std::io::Error::from_raw_os_error(code as i32)
}

/// Error numbers in replies: those of Linux.
pub const EPERM: u32 = 1;
/// See [`EPERM`].
pub const EIO: u32 = 5;
/// See [`EPERM`].
pub const ENOMEM: u32 = 12;
/// See [`EPERM`].
pub const EINVAL: u32 = 22;
/// See [`EPERM`].
pub const ENOSPC: u32 = 28;
/// See [`EPERM`].
pub const EOVERFLOW: u32 = 75;
/// See [`EPERM`].
pub const ENOTSUP: u32 = 95;
/// See [`EPERM`].
pub const ESHUTDOWN: u32 = 108;
