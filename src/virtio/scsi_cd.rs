//! The commands of a CD or DVD drive that reads (MMC-6): what Linux's sr and others use.
//!
//! Owns: what they mean. Never: the tray's state (`block/tray.rs`), common commands
//! (`scsi_unit.rs`). Threads: workers, several at once on one unit. Locks: none.
//!
//! Every medium is one session with one data track of 2048-byte sectors.

use super::scsi_sense::{Cdb, Fail, Sense};
use super::scsi_unit::{Unit, fits, give};
use crate::block::handle::Request;
use crate::block::stats::Kind as Stat;
use crate::sys::iov::{Iov, IovMut};

/// Sectors of the longest CD, of 80 minutes; what is longer is a DVD.
const CD_MAX: u64 = 80 * 60 * 75;
const PROFILE_CD: u16 = 0x0008;
const PROFILE_DVD: u16 = 0x0010;
/// Class of the media events, and its bit.
const MEDIA: u8 = 4;

impl Unit {
    pub(super) fn cd_command(&self, cdb: &Cdb, _: &Iov, input: &mut IovMut) -> Result<usize, Fail> {
        match cdb.byte(0) {
            // READ (6), (10), (12), (16)
            0x08 | 0x28 | 0xa8 | 0x88 => self.read(cdb, input),
            0xbe => self.read_cd(cdb, input),
            0x25 => self.read_capacity_10(cdb, input),
            // SEEK (10)
            0x2b => self.range(cdb.be32(2), 0, Stat::Read).map(|_| 0),
            0x43 => self.read_toc(cdb, input),
            0x46 => self.get_configuration(cdb, input),
            0x4a => self.event_status(cdb, input),
            0x51 => self.disc_information(cdb, input),
            // SET CD SPEED: it is as fast as it can be.
            0xbb => Ok(0),
            0xbd => self.mechanism_status(cdb, input),
            // WRITE (6), (10), (12), (16): no drive of ours writes.
            0x0a | 0x2a | 0xaa | 0x8a => self.ready().and(Err(Sense::WRITE_PROTECTED.into())),
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    /// READ CD: the user data of data sectors.
    fn read_cd(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let (lba, count) = (cdb.be32(2), cdb.be24(6));
        // Any sector type, or mode 1.
        if !matches!(cdb.byte(1) >> 2 & 7, 0 | 2) {
            return Err(Sense::ILLEGAL_MODE.into());
        }
        // No subchannel, no error flags; user data or nothing.
        if cdb.byte(10) & 7 != 0 || cdb.byte(9) & 0x06 != 0 || !matches!(cdb.byte(9) & 0xf8, 0 | 0x10) {
            return Err(Sense::INVALID_FIELD.into());
        }
        let on = self.extent(lba, count, Stat::Read)?;
        if cdb.byte(9) & 0xf8 == 0 || on.len == 0 {
            return Ok(0);
        }
        let len = fits(on.len, input.len())?;
        self.submit(&on, Request::Read(on.off, &mut input.slice(0, len)))?;
        Ok(len)
    }

    fn read_toc(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        self.ready()?;
        let (msf, start, alloc) = (cdb.byte(1) & 2 != 0, cdb.byte(6), cdb.be16(7));
        // Old drivers say the format in the control byte.
        let format = if cdb.byte(2) & 0x0f != 0 { cdb.byte(2) & 0x0f } else { cdb.byte(9) >> 6 };
        let address = |lba: u64| {
            if !msf {
                return u32::try_from(lba).unwrap_or(u32::MAX).to_be_bytes();
            }
            // Two seconds of lead-in; the last that can be said is 255:59:74.
            let frames = (lba + 150).min(256 * 60 * 75 - 1);
            [0, (frames / 75 / 60) as u8, (frames / 75 % 60) as u8, (frames % 75) as u8]
        };
        // ADR 1, a data track.
        let entry = |track: u8, lba: u64| [&[0, 0x14, track, 0], &address(lba)[..]].concat();
        let entries = match format {
            0 if start > 1 && start != 0xaa => return Err(Sense::INVALID_FIELD.into()),
            0 if start == 0xaa => entry(0xaa, self.block_count()),
            0 => [entry(1, 0), entry(0xaa, self.block_count())].concat(),
            // The first track of the last session.
            1 => entry(1, 0),
            _ => return Err(Sense::INVALID_FIELD.into()),
        };
        // Length, first track (or session), last track.
        let head = [0, entries.len() as u8 + 2, 1, 1];
        give(&[&head[..], &entries].concat(), alloc, input)
    }

    fn profile(&self) -> u16 {
        match self.has_medium() {
            false => 0,
            true if self.block_count() > CD_MAX => PROFILE_DVD,
            true => PROFILE_CD,
        }
    }

    fn get_configuration(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let (which, start, alloc) = (cdb.byte(1) & 3, cdb.be16(2), cdb.be16(7));
        let now = self.profile();
        let listed = |profile: u16| {
            let bytes = profile.to_be_bytes();
            [bytes[0], bytes[1], u8::from(profile == now), 0]
        };
        // Number, version, persistent, current, data (MMC-6, 5.3).
        let medium = now != 0;
        let features: [(u16, u8, bool, bool, Vec<u8>); 7] = [
            // Profile list
            (0x0000, 0, true, true, [listed(PROFILE_DVD), listed(PROFILE_CD)].concat()),
            // Core: SCSI; DBE
            (0x0001, 2, true, true, vec![0, 0, 0, 1, 1, 0, 0, 0]),
            // Morphing: GET EVENT STATUS NOTIFICATION is polled
            (0x0002, 1, true, true, vec![0x02, 0, 0, 0]),
            // Removable medium: a tray, eject, lock
            (0x0003, 0, true, true, vec![0x29, 0, 0, 0]),
            // Random readable: blocks of 2048 bytes, one at a time
            (0x0010, 0, false, medium, vec![0, 0, 8, 0, 0, 1, 0, 0]),
            // CD read
            (0x001e, 2, false, now == PROFILE_CD, vec![0, 0, 0, 0]),
            // DVD read
            (0x001f, 0, false, now == PROFILE_DVD, vec![]),
        ];
        let mut body = Vec::new();
        for (number, version, persistent, current, data) in features {
            let wanted = match which {
                0 => usize::from(number) >= start,
                1 => current && usize::from(number) >= start,
                2 => usize::from(number) == start,
                _ => return Err(Sense::INVALID_FIELD.into()),
            };
            if wanted {
                body.extend(number.to_be_bytes());
                body.push(version << 2 | u8::from(persistent) << 1 | u8::from(current));
                body.push(data.len() as u8);
                body.extend(data);
            }
        }
        let mut data = (body.len() as u32 + 4).to_be_bytes().to_vec();
        data.extend([0, 0]);
        data.extend(now.to_be_bytes());
        data.extend(body);
        give(&data, alloc, input)
    }

    fn event_status(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        // Not polled would be to wait for the next event.
        if cdb.byte(1) & 1 == 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let alloc = cdb.be16(7);
        fits(alloc as u64, input.len())?;
        if cdb.byte(4) & 1 << MEDIA == 0 {
            // NEA: none of those classes.
            return give(&[0, 2, 0x80, 1 << MEDIA], alloc, input);
        }
        // With room for the header only the event stays.
        let event = self.tray.as_ref().filter(|_| alloc > 4).and_then(|t| t.take_event());
        let status = u8::from(self.tray_open()) | u8::from(self.has_medium()) << 1;
        give(&[0, 6, MEDIA, 1 << MEDIA, event.map_or(0, |e| e as u8), status, 0, 0], alloc, input)
    }

    fn disc_information(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        self.ready()?;
        // Standard disc information only.
        if cdb.byte(1) & 7 != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut data = [0; 34];
        // The session and the disc are complete; track 1 of session 1 is all there is;
        // unrestricted use.
        data[..8].copy_from_slice(&[0, 32, 0x0e, 1, 1, 1, 1, 0x20]);
        give(&data, cdb.be16(7), input)
    }

    fn mechanism_status(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let door = if self.tray_open() { 0x10 } else { 0 };
        give(&[0, door, 0, 0, 0, 1, 0, 0], cdb.be16(8), input)
    }
}

#[cfg(test)]
#[path = "scsi_cd_test.rs"]
mod tests;
