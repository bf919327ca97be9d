//! Sense data: why a SCSI command failed (SPC-4, 4.5), and how a command is cut up.
//!
//! Owns: the codes, the fixed and the descriptor format, [`Cdb`]. Never: decides anything. Threads:
//! any. Locks: none.

/// Sense key, additional sense code and its qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense(pub u8, pub u8, pub u8);

impl Sense {
    /// Nothing to say.
    pub const NONE: Sense = Sense(0, 0, 0);
    /// Not ready: no medium, the tray is closed.
    pub const NO_MEDIUM: Sense = Sense(2, 0x3a, 1);
    /// Not ready: no medium, the tray is open.
    pub const TRAY_OPEN: Sense = Sense(2, 0x3a, 2);
    /// Not ready: a disk of no length.
    pub const NOT_READY: Sense = Sense(2, 0x04, 0);
    /// A read failed.
    pub const READ_ERROR: Sense = Sense(3, 0x11, 0);
    /// A write failed.
    pub const WRITE_ERROR: Sense = Sense(3, 0x0c, 0);
    /// The device itself failed.
    pub const TARGET_FAILURE: Sense = Sense(4, 0x44, 0);
    /// No such command.
    pub const INVALID_OPCODE: Sense = Sense(5, 0x20, 0);
    /// Blocks beyond the end.
    pub const LBA_OUT_OF_RANGE: Sense = Sense(5, 0x21, 0);
    /// A field of the command makes no sense.
    pub const INVALID_FIELD: Sense = Sense(5, 0x24, 0);
    /// Nobody has this logical unit number.
    pub const LUN_NOT_SUPPORTED: Sense = Sense(5, 0x25, 0);
    /// A field of the parameters makes no sense.
    pub const INVALID_PARAMETER: Sense = Sense(5, 0x26, 0);
    /// The parameters have an impossible length.
    pub const INVALID_LENGTH: Sense = Sense(5, 0x1a, 0);
    /// Parameters are not saved.
    pub const SAVING_NOT_SUPPORTED: Sense = Sense(5, 0x39, 0);
    /// The guest itself has locked the tray.
    pub const REMOVAL_PREVENTED: Sense = Sense(5, 0x53, 2);
    /// No such kind of sector on this medium.
    pub const ILLEGAL_MODE: Sense = Sense(5, 0x64, 0);
    /// Power on, or reset.
    pub const RESET: Sense = Sense(6, 0x29, 0);
    /// This logical unit was reset.
    pub const UNIT_RESET: Sense = Sense(6, 0x29, 3);
    /// The medium may be another one.
    pub const MEDIUM_CHANGED: Sense = Sense(6, 0x28, 0);
    /// The length has changed.
    pub const CAPACITY_CHANGED: Sense = Sense(6, 0x2a, 9);
    /// Logical units have come or gone.
    pub const LUNS_CHANGED: Sense = Sense(6, 0x3f, 0x0e);
    /// The medium cannot be written.
    pub const WRITE_PROTECTED: Sense = Sense(7, 0x27, 0);
    /// No space left below.
    pub const SPACE_ALLOCATION: Sense = Sense(7, 0x27, 7);
    /// What was compared is not the same.
    pub const MISCOMPARE: Sense = Sense(0x0e, 0x1d, 0);

    /// Fixed format (SPC-4, 4.5.3).
    pub fn fixed(self) -> [u8; 18] {
        let mut bytes = [0; 18];
        (bytes[0], bytes[2], bytes[7]) = (0x70, self.0, 10);
        (bytes[12], bytes[13]) = (self.1, self.2);
        bytes
    }

    /// Descriptor format (SPC-4, 4.5.2), without descriptors.
    pub fn descriptor(self) -> [u8; 8] {
        [0x72, self.0, self.1, self.2, 0, 0, 0, 0]
    }
}

/// A command descriptor block, padded with zeroes: every field can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb(pub [u8; 32]);

impl Cdb {
    /// The first 32 bytes.
    pub fn new(bytes: &[u8]) -> Cdb {
        let mut cdb = [0; 32];
        let len = bytes.len().min(32);
        cdb[..len].copy_from_slice(&bytes[..len]);
        Cdb(cdb)
    }

    /// Byte `at`; the first one is the operation code.
    pub fn byte(&self, at: usize) -> u8 {
        self.0[at]
    }

    /// A number of `len` bytes, big-endian.
    fn number(&self, at: usize, len: usize) -> u64 {
        self.0[at..at + len].iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// Two bytes.
    pub fn be16(&self, at: usize) -> usize {
        self.number(at, 2) as usize
    }

    /// Three bytes.
    pub fn be24(&self, at: usize) -> u64 {
        self.number(at, 3)
    }

    /// Four bytes.
    pub fn be32(&self, at: usize) -> u64 {
        self.number(at, 4)
    }

    /// Eight bytes.
    pub fn be64(&self, at: usize) -> u64 {
        self.number(at, 8)
    }

    /// First block and number of blocks, by the length of the command (SBC-4: commands of one
    /// group have these at the same places).
    pub fn blocks(&self) -> (u64, u64) {
        match self.byte(0) >> 5 {
            // Six bytes: 21 bits, and 0 is 256.
            0 => (self.be24(1) & 0x1f_ffff, if self.byte(4) == 0 { 256 } else { self.byte(4).into() }),
            1 | 2 => (self.be32(2), self.be16(7) as u64),
            5 => (self.be32(2), self.be32(6)),
            _ => (self.be64(2), self.be32(10)),
        }
    }
}

/// Why a command has no good status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fail {
    /// CHECK CONDITION with this sense.
    Check(Sense),
    /// The command speaks of more data than the request has room for.
    Overrun,
    /// It failed below and the VM is about to stop: it is to be done again.
    Hold,
    /// The unit is gone.
    Gone,
}

impl From<Sense> for Fail {
    fn from(sense: Sense) -> Fail {
        Fail::Check(sense)
    }
}
