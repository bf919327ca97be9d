//! What a SCSI unit says of itself: INQUIRY, vital product data, mode pages (SPC-4, 6.4, 7.5, 7.8).
//!
//! Owns: those bytes. Never: data of the medium. Threads: workers. Locks: none of its own.

use super::scsi_disk::MAX_DESCRIPTORS;
use super::scsi_sense::{Cdb, Fail, Sense};
use super::scsi_unit::{MAX_DATA, Unit, UnitKind, fits, give};
use crate::sys::iov::{Iov, IovMut};

/// The read-write error recovery mode page.
const RECOVERY: u8 = 0x01;
/// The caching mode page.
const CACHING: u8 = 0x08;
/// The control mode page.
const CONTROL: u8 = 0x0a;
/// The capabilities of a CD drive.
const CAPABILITIES: u8 = 0x2a;
/// Bit of the write cache in byte 2 of the caching page.
const WCE: u8 = 0x04;

/// `text` in a field of `N` bytes, padded with spaces.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [b' '; N];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

impl Unit {
    fn kind_byte(&self) -> u8 {
        if self.config.kind == UnitKind::Cd { 5 } else { 0 }
    }

    pub(super) fn inquiry_data(&self) -> Vec<u8> {
        let removable = if self.config.removable { 0x80 } else { 0 };
        // SPC-3; HISUP and response format 2; 31 more bytes; CMDQUE.
        let mut data = vec![self.kind_byte(), removable, 5, 0x12, 31, 0, 0, 0x02];
        data.extend(field::<8>(&self.config.vendor));
        data.extend(field::<16>(&self.config.product));
        data.extend(field::<4>(&self.config.version));
        data
    }

    /// Page `page` of the vital product data; None: there is no such page.
    pub(super) fn vpd(&self, page: u8) -> Option<Vec<u8>> {
        let disk = self.config.kind == UnitKind::Disk;
        let has_serial = !self.config.serial.is_empty();
        let body = match page {
            0x00 => {
                let mut pages = vec![0x00];
                pages.extend(has_serial.then_some(0x80));
                pages.push(0x83);
                pages.extend_from_slice(if disk { &[0xb0, 0xb1, 0xb2] } else { &[] });
                pages
            }
            0x80 if has_serial => self.config.serial.as_bytes().to_vec(),
            0x83 => self.identification(),
            0xb0 if disk => self.block_limits(),
            0xb1 if disk => {
                let mut body = vec![0; 60];
                body[..2].copy_from_slice(&self.config.rotation_rate.to_be_bytes());
                body
            }
            // LBPU, LBPWS, LBPWS10; thin provisioning. (No threshold, no promise of zeroes.)
            0xb2 if disk => vec![0, if self.is_read_only() { 0 } else { 0xe0 }, 2, 0],
            _ => return None,
        };
        // No text is that long: the properties were checked.
        let len = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
        Some([&[self.kind_byte(), page, len[0], len[1]][..], &body].concat())
    }

    fn identification(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let id = self.config.device_id.as_bytes();
        if !id.is_empty() {
            // ASCII, of the vendor's own kind.
            body.extend([0x02, 0x00, 0, id.len() as u8]);
            body.extend(id);
        }
        if self.config.wwn != 0 {
            // Binary, NAA.
            body.extend([0x01, 0x03, 0, 8]);
            body.extend(self.config.wwn.to_be_bytes());
        }
        body
    }

    fn block_limits(&self) -> Vec<u8> {
        let block = self.block();
        let blocks = |bytes: u64| u32::try_from(bytes / block).unwrap_or(u32::MAX).to_be_bytes();
        let mut body = vec![0; 60];
        let mut put = |at: usize, value: &[u8]| body[at - 4..][..value.len()].copy_from_slice(value);
        // WSNZ: a WRITE SAME of no blocks is refused.
        put(4, &[1]);
        let min = u16::try_from(u64::from(self.config.min_io_size) / block).unwrap_or(u16::MAX);
        put(6, &min.to_be_bytes());
        put(8, &blocks(self.config.max_io_size));
        put(12, &blocks(self.config.opt_io_size.into()));
        put(20, &blocks(self.config.max_unmap_size));
        put(24, &MAX_DESCRIPTORS.to_be_bytes());
        put(28, &blocks(self.granularity.into()));
        put(36, &(MAX_DATA / block).to_be_bytes());
        body
    }

    /// A mode page without its header, as it is or (`changeable`) which bits can be changed.
    fn page(&self, page: u8, changeable: bool) -> Option<Vec<u8>> {
        let disk = self.config.kind == UnitKind::Disk;
        let mut body = match page {
            // AWRE
            RECOVERY if disk => vec![0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            RECOVERY => vec![0; 10],
            CACHING => {
                let on = changeable || self.handle.write_cache();
                let mut body = vec![0; 18];
                body[0] = if disk && on { WCE } else { 0 };
                return Some(body);
            }
            CONTROL => vec![0; 10],
            CAPABILITIES if !disk => {
                // CD-R, CD-RW and DVD are read; nothing is written; several sessions; a tray that
                // can be locked and opened; 8800 KB/s.
                let locked = self.tray.as_ref().is_some_and(|t| t.is_locked());
                let speed = 8800u16.to_be_bytes();
                let mut body = vec![0x0b, 0, 0x70, 0, 0x29 | if locked { 2 } else { 0 }, 0];
                body.extend([speed[0], speed[1], 0, 2, 0x08, 0, speed[0], speed[1], 0, 0, 0, 0]);
                body
            }
            _ => return None,
        };
        if changeable {
            body.fill(0);
        }
        Some(body)
    }

    pub(super) fn mode_sense(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let ten = cdb.byte(0) == 0x5a;
        let alloc = if ten { cdb.be16(7) } else { cdb.byte(4).into() };
        let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f, cdb.byte(3));
        if control == 3 {
            return Err(Sense::SAVING_NOT_SUPPORTED.into());
        }
        if !matches!((page, subpage), (_, 0) | (0x3f, 0xff)) {
            return Err(Sense::INVALID_FIELD.into());
        }
        let disk = self.config.kind == UnitKind::Disk;
        let mut pages = Vec::new();
        for number in [RECOVERY, CACHING, CONTROL, CAPABILITIES] {
            if (page == number || page == 0x3f)
                && let Some(body) = self.page(number, control == 1)
            {
                pages.extend([number, body.len() as u8]);
                pages.extend(body);
            }
        }
        // Page 0 is no page: only the header and the block descriptor.
        if pages.is_empty() && page != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut descriptor = Vec::new();
        if disk && cdb.byte(1) & 0x08 == 0 {
            let count = self.block_count();
            // Three bytes each; 0 is "ask READ CAPACITY".
            let count = if count > 0xff_ffff { 0 } else { count as u32 };
            descriptor.extend(count.to_be_bytes());
            descriptor.extend(self.config.logical_block_size.to_be_bytes());
        }
        let specific = match (disk, self.is_read_only()) {
            (false, _) => 0,
            (true, read_only) => {
                (if read_only { 0x80 } else { 0 }) | if self.config.dpofua { 0x10 } else { 0 }
            }
        };
        let all = descriptor.len() + pages.len();
        let mut data = match ten {
            true => vec![0, all as u8 + 6, 0, specific, 0, 0, 0, descriptor.len() as u8],
            false => vec![all as u8 + 3, 0, specific, descriptor.len() as u8],
        };
        data.extend(descriptor);
        data.extend(pages);
        give(&data, alloc, input)
    }

    /// The only thing that can be changed is the write cache of a disk.
    pub(super) fn mode_select(&self, cdb: &Cdb, out: &Iov) -> Result<usize, Fail> {
        let ten = cdb.byte(0) == 0x55;
        // PF: pages as in the standard; not SP: nothing is saved.
        if cdb.byte(1) & 0x11 != 0x10 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let len = fits(if ten { cdb.be16(7) as u64 } else { cdb.byte(4).into() }, out.len())?;
        if len == 0 {
            return Ok(0);
        }
        let mut list = vec![0; len];
        out.copy_to(0, &mut list);
        let header = if ten { 8 } else { 4 };
        if len < header {
            return Err(Sense::INVALID_LENGTH.into());
        }
        let descriptor = match ten {
            true => usize::from(u16::from_be_bytes([list[6], list[7]])),
            false => list[3].into(),
        };
        if !matches!(descriptor, 0 | 8) || header + descriptor > len {
            return Err(Sense::INVALID_PARAMETER.into());
        }
        if descriptor == 8 {
            let d = &list[header + 4..header + 8];
            let size = u32::from_be_bytes([0, d[1], d[2], d[3]]);
            if size != self.config.logical_block_size {
                return Err(Sense::INVALID_PARAMETER.into());
            }
        }
        let mut write_cache = None;
        let mut rest = &list[header + descriptor..];
        while !rest.is_empty() {
            let [code, body_len, ..] = *rest else { return Err(Sense::INVALID_LENGTH.into()) };
            let Some(theirs) = rest.get(2..2 + usize::from(body_len)) else {
                return Err(Sense::INVALID_LENGTH.into());
            };
            // Subpages have the bit 0x40; PS is reserved here.
            let mine = self.page(code & 0x7f, false).ok_or(Sense::INVALID_PARAMETER)?;
            let mask = self.page(code & 0x7f, true).ok_or(Sense::INVALID_PARAMETER)?;
            let same = mine.len() == theirs.len()
                && mine.iter().zip(theirs).zip(&mask).all(|((m, t), mask)| (m ^ t) & !mask == 0);
            if !same {
                return Err(Sense::INVALID_PARAMETER.into());
            }
            if code & 0x3f == CACHING && mask[0] & WCE != 0 {
                write_cache = Some(theirs[0] & WCE != 0);
            }
            rest = &rest[2 + theirs.len()..];
        }
        if let Some(on) = write_cache {
            if !on {
                // What is in the cache was written by somebody who may not flush again.
                self.done(false, self.handle.flush())?;
            }
            self.handle.set_write_cache(on);
        }
        Ok(0)
    }
}
