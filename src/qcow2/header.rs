//! The header and its extensions: bytes → [`Header`] and back. No I/O, no locks, any thread.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Header", "Additional fields", "Header
//! extensions". Everything read here comes from a file that may be hostile: each length and
//! offset is checked before use, and what a table may need in memory is bounded. Refusals use
//! QEMU's texts, for people and scripts know them.

use super::types::{Geometry, be32, be64};
use std::io;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;

/// Incompatible feature: refcounts may be wrong.
pub const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible feature: metadata are broken; read only.
pub const INCOMPAT_CORRUPT: u64 = 2;
/// Incompatible feature: guest data lie in another file.
pub const INCOMPAT_DATA_FILE: u64 = 4;
/// Incompatible feature: `compression_type` is not 0.
pub const INCOMPAT_COMPRESSION: u64 = 8;
/// Incompatible feature: extended L2 entries.
pub const INCOMPAT_EXTENDED_L2: u64 = 16;
/// All incompatible features that this driver knows.
const INCOMPAT_KNOWN: u64 = 31;
/// Compatible feature: refcount updates may be lazy.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature: stored bitmaps are consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature: the external data file is a raw image by itself.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 2;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Largest L1 table in bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's limit).
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Largest encryption header in bytes.
const MAX_CRYPTO: u64 = 16 << 20;
/// Most snapshots (QEMU's limit).
const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing or data file name in bytes (the specification's limit).
pub const MAX_NAME: usize = 1023;
/// Bytes of a version 2 header.
const V2_LENGTH: u32 = 72;
/// Bytes of the version 3 header that this driver writes.
const V3_LENGTH: u32 = 112;

/// An encryption method of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crypt {
    /// None.
    None,
    /// AES-256-CBC, "legacy".
    Aes,
    /// LUKS1.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// Where the directory of stored bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExt {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub size: u64,
    /// Its offset in the file.
    pub offset: u64,
}

/// A header, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// Encryption method.
    pub crypt: Crypt,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Its offset.
    pub l1_offset: u64,
    /// The refcount table's offset.
    pub reftable_offset: u64,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// The snapshot table's offset.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Header fields that this driver does not know, as they are.
    pub unknown_fields: Vec<u8>,
    /// Name of the backing file, as it is.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Stored bitmaps.
    pub bitmaps: Option<BitmapsExt>,
    /// Offset and length of the LUKS header.
    pub crypto: Option<(u64, u64)>,
    /// The feature name table, as it is.
    pub feature_names: Option<Vec<u8>>,
    /// Extensions that this driver does not know, as they are.
    pub unknown_extensions: Vec<(u32, Vec<u8>)>,
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// The cluster size that the first bytes of a header name, so that the caller can read the whole
/// first cluster.
///
/// # Errors
/// Not qcow2, unknown version, unsupported cluster size.
pub fn peek_cluster_size(bytes: &[u8]) -> io::Result<u64> {
    if bytes.len() < V2_LENGTH as usize || be32(bytes, 0) != MAGIC {
        return Err(bad("Image is not in qcow2 format"));
    }
    let version = be32(bytes, 4);
    if version != 2 && version != 3 {
        return Err(bad(format!("Unsupported qcow2 version {version}")));
    }
    let bits = be32(bytes, 20);
    if !(9..=21).contains(&bits) {
        return Err(bad(format!("Unsupported cluster size: 2^{bits}")));
    }
    Ok(1 << bits)
}

impl Header {
    /// Parses the first cluster of an image (or as much of it as the file has).
    ///
    /// # Errors
    /// QEMU's text for what is wrong, or for an incompatible feature that is not supported.
    pub fn parse(bytes: &[u8]) -> io::Result<Header> {
        let cluster_size = peek_cluster_size(bytes)?;
        let version = be32(bytes, 4);
        let length = if version == 2 { V2_LENGTH } else { be_at(bytes, 100)? };
        if version == 3 && length < 104 {
            return Err(bad("qcow2 header too short"));
        }
        if u64::from(length) > cluster_size || length as usize > bytes.len() {
            return Err(bad("qcow2 header exceeds cluster size"));
        }
        let v3 = |at: usize| if version == 2 { 0 } else { be64(bytes, at) };
        let mut h = Header {
            version,
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            crypt: match be32(bytes, 32) {
                0 => Crypt::None,
                1 => Crypt::Aes,
                2 => Crypt::Luks,
                n => return Err(bad(format!("Unsupported encryption method {n}"))),
            },
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version == 2 { 4 } else { be32(bytes, 96) },
            compression: Compression::Zlib,
            unknown_fields: bytes.get(V3_LENGTH as usize..length as usize).unwrap_or(&[]).to_vec(),
            backing_file: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
            crypto: None,
            feature_names: None,
            unknown_extensions: Vec::new(),
        };
        let backing_offset = be64(bytes, 8);
        let backing_size = be32(bytes, 16) as usize;
        if backing_offset > cluster_size || (backing_offset != 0 && backing_offset < length.into()) {
            return Err(bad("Invalid backing file offset"));
        }
        let end = if backing_offset == 0 { bytes.len() } else { backing_offset as usize };
        h.parse_extensions(bytes.get(length as usize..end.min(bytes.len())).unwrap_or(&[]))?;
        h.check_features()?;
        let compression = if length > 104 { bytes[104] } else { 0 };
        let flagged = h.incompatible & INCOMPAT_COMPRESSION != 0;
        h.compression = match (compression, flagged) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) => {
                return Err(bad("qcow2: Compression type incompatible feature bit must not be set"));
            }
            (1, false) => {
                return Err(bad("qcow2: Compression type incompatible feature bit must be set"));
            }
            (n, _) => return Err(bad(format!("qcow2: unknown compression type: {n}"))),
        };
        if h.refcount_order > 6 {
            return Err(bad("Reference count entry width too large; may not exceed 64 bits"));
        }
        if backing_offset != 0 {
            if backing_size > MAX_NAME || backing_size as u64 > cluster_size - backing_offset {
                return Err(bad("Backing file name too long"));
            }
            let name = bytes
                .get(backing_offset as usize..backing_offset as usize + backing_size)
                .ok_or_else(|| bad("Could not read backing file name"))?;
            h.backing_file = Some(text(name, "Backing file name")?);
        }
        h.check_tables()?;
        Ok(h)
    }

    fn parse_extensions(&mut self, mut rest: &[u8]) -> io::Result<()> {
        while rest.len() >= 8 {
            let (kind, len) = (be32(rest, 0), be32(rest, 4) as usize);
            if kind == EXT_END {
                break;
            }
            let data = rest.get(8..).and_then(|r| r.get(..len));
            let data = data.ok_or_else(|| bad("Header extension too large"))?;
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(text(data, "Backing format")?),
                EXT_DATA_FILE => self.data_file = Some(text(data, "Data file name")?),
                EXT_FEATURE_NAMES => self.feature_names = Some(data.to_vec()),
                EXT_CRYPTO => {
                    if self.crypt != Crypt::Luks {
                        return Err(bad("CRYPTO header extension only expected with LUKS encryption method"));
                    }
                    if len != 16 {
                        return Err(bad(format!("CRYPTO header extension size {len}, but expected size 16")));
                    }
                    let (at, length) = (be64(data, 0), be64(data, 8));
                    if at & (self.geometry().cluster_size() - 1) != 0 {
                        return Err(bad(format!(
                            "Encryption header offset '{at}' is not a multiple of cluster size '{}'",
                            self.geometry().cluster_size()
                        )));
                    }
                    // QEMU's headers have 2 MB, whatever the cipher.
                    if length > MAX_CRYPTO || at > i64::MAX as u64 - MAX_CRYPTO {
                        return Err(bad(format!("Encryption header at {at} of {length} bytes is too large")));
                    }
                    self.crypto = Some((at, length));
                }
                EXT_BITMAPS => self.parse_bitmaps(data)?,
                _ => self.unknown_extensions.push((kind, data.to_vec())),
            }
            rest = rest.get(8 + len.next_multiple_of(8)..).unwrap_or(&[]);
        }
        if self.autoclear & AUTOCLEAR_BITMAPS != 0 && self.bitmaps.is_none() {
            // "It is an error if this bit is set without the bitmaps extension present": nothing
            // depends on the bit without it, so the rest of the image is still good.
            self.autoclear &= !AUTOCLEAR_BITMAPS;
        }
        Ok(())
    }

    fn parse_bitmaps(&mut self, data: &[u8]) -> io::Result<()> {
        if data.len() != 24 {
            return Err(bad(format!("bitmaps_ext: Invalid extension length: {}", data.len())));
        }
        if self.autoclear & AUTOCLEAR_BITMAPS == 0 {
            // Inconsistent by the specification; its clusters are leaked, and the extension goes
            // when the image is first written to.
            return Ok(());
        }
        let ext = BitmapsExt { count: be32(data, 0), size: be64(data, 8), offset: be64(data, 16) };
        if be32(data, 4) != 0 {
            return Err(bad("bitmaps_ext: Reserved field is not zero"));
        }
        if ext.count == 0 {
            return Err(bad("found bitmaps extension with zero bitmaps"));
        }
        if ext.count > 65535 {
            return Err(bad(format!(
                "bitmaps_ext: image has {} bitmaps, exceeding the QEMU supported maximum of 65535",
                ext.count
            )));
        }
        if ext.offset & (self.geometry().cluster_size() - 1) != 0 {
            return Err(bad("bitmaps_ext: invalid bitmap directory offset"));
        }
        // 65535 entries of at most 24 + 1023 bytes each, rounded up.
        if ext.size > 65535 * 1048 {
            return Err(bad(format!(
                "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size ({})",
                ext.size,
                65535 * 1048
            )));
        }
        self.bitmaps = Some(ext);
        Ok(())
    }

    fn check_features(&self) -> io::Result<()> {
        let mut unknown = self.incompatible & !INCOMPAT_KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let mut names = Vec::new();
        for entry in self.feature_names.as_deref().unwrap_or(&[]).chunks_exact(48) {
            let bit = 1u64.checked_shl(entry[1].into()).unwrap_or(0);
            if entry[0] == 0 && unknown & bit != 0 {
                let name = &entry[2..];
                let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
                names.push(String::from_utf8_lossy(&name[..end]).into_owned());
                unknown &= !bit;
            }
        }
        if unknown != 0 {
            names.push(format!("Unknown incompatible feature: {unknown:x}"));
        }
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("Unsupported qcow2 feature(s): {}", names.join(", ")),
        ))
    }

    fn check_tables(&self) -> io::Result<()> {
        let g = self.geometry();
        if g.extended && g.cluster_bits < 14 {
            return Err(bad(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        let table = |what: &str, offset: u64, bytes: u64, max: u64| {
            if bytes > max {
                return Err(bad(format!("{what} too large")));
            }
            if offset & (g.cluster_size() - 1) != 0
                || offset.checked_add(bytes).is_none_or(|end| end > i64::MAX as u64)
            {
                return Err(bad(format!("{what} offset invalid")));
            }
            Ok(())
        };
        if self.reftable_clusters == 0 {
            return Err(bad("Image does not contain a reference count table"));
        }
        table(
            "Reference count table",
            self.reftable_offset,
            u64::from(self.reftable_clusters) << g.cluster_bits,
            MAX_REFTABLE_BYTES,
        )?;
        if self.reftable_offset == 0 {
            return Err(bad("Reference count table offset invalid"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(bad("Snapshot table too large"));
        }
        table("Snapshot table", self.snapshots_offset, u64::from(self.snapshots) * 40, 1 << 32)?;
        table("Active L1 table", self.l1_offset, u64::from(self.l1_size) * 8, MAX_L1_BYTES)?;
        if self.size > i64::MAX as u64 - g.cluster_size() {
            return Err(bad("Image is too big"));
        }
        if g.l1_entries(self.size) > u64::from(self.l1_size) {
            return Err(bad("L1 table is too small"));
        }
        if self.l1_size != 0 && self.l1_offset == 0 {
            return Err(bad("Active L1 table offset invalid"));
        }
        if self.incompatible & INCOMPAT_DATA_FILE == 0 && self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0 {
            return Err(bad("data-file-raw requires data-file"));
        }
        Ok(())
    }

    /// Sizes and shifts.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended: self.incompatible & INCOMPAT_EXTENDED_L2 != 0,
            external: self.incompatible & INCOMPAT_DATA_FILE != 0,
            v3: self.version >= 3,
        }
    }

    /// True when guest data lie in an external file.
    pub fn needs_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// Bytes of the fixed part.
    pub fn length(&self) -> usize {
        match self.version {
            2 => V2_LENGTH as usize,
            _ => V3_LENGTH as usize + self.unknown_fields.len(),
        }
    }

    /// Puts the fields that change while an image is open into `sector`, the first 512 bytes of
    /// the file, which keep everything else. One sector: written whole or not at all.
    pub fn patch(&self, sector: &mut [u8]) {
        sector[24..32].copy_from_slice(&self.size.to_be_bytes());
        sector[36..40].copy_from_slice(&self.l1_size.to_be_bytes());
        sector[40..48].copy_from_slice(&self.l1_offset.to_be_bytes());
        sector[48..56].copy_from_slice(&self.reftable_offset.to_be_bytes());
        sector[56..60].copy_from_slice(&self.reftable_clusters.to_be_bytes());
        sector[60..64].copy_from_slice(&self.snapshots.to_be_bytes());
        sector[64..72].copy_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            sector[72..80].copy_from_slice(&self.incompatible.to_be_bytes());
            sector[80..88].copy_from_slice(&self.compatible.to_be_bytes());
            sector[88..96].copy_from_slice(&self.autoclear.to_be_bytes());
        }
    }

    /// The whole header with extensions and backing file name, as it begins the first cluster.
    ///
    /// # Errors
    /// It does not fit into a cluster.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut b = vec![0; self.length()];
        b[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        b[4..8].copy_from_slice(&self.version.to_be_bytes());
        b[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        b[32..36].copy_from_slice(&(self.crypt as u32).to_be_bytes());
        self.patch(&mut b);
        if self.version >= 3 {
            b[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
            let length = self.length() as u32;
            b[100..104].copy_from_slice(&length.to_be_bytes());
            b[104] = self.compression as u8;
            b[V3_LENGTH as usize..].copy_from_slice(&self.unknown_fields);
        }
        let mut ext = |kind: u32, data: &[u8]| {
            b.extend_from_slice(&kind.to_be_bytes());
            b.extend_from_slice(&(data.len() as u32).to_be_bytes());
            b.extend_from_slice(data);
            b.resize(b.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            ext(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            ext(EXT_DATA_FILE, name.as_bytes());
        }
        if let Some((offset, length)) = self.crypto {
            ext(EXT_CRYPTO, &[offset.to_be_bytes(), length.to_be_bytes()].concat());
        }
        if let Some(names) = &self.feature_names {
            ext(EXT_FEATURE_NAMES, names);
        }
        if let Some(bitmaps) = self.bitmaps {
            let mut data = u64::from(bitmaps.count).rotate_left(32).to_be_bytes().to_vec();
            data.extend_from_slice(&bitmaps.size.to_be_bytes());
            data.extend_from_slice(&bitmaps.offset.to_be_bytes());
            ext(EXT_BITMAPS, &data);
        }
        for (kind, data) in &self.unknown_extensions {
            ext(*kind, data);
        }
        ext(EXT_END, &[]);
        if let Some(name) = &self.backing_file {
            let at = b.len() as u64;
            b[8..16].copy_from_slice(&at.to_be_bytes());
            b[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            b.extend_from_slice(name.as_bytes());
        }
        if b.len() as u64 > self.geometry().cluster_size() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "The header with its names does not fit into one cluster",
            ));
        }
        Ok(b)
    }
}

/// The feature name table that QEMU writes into version 3 images.
pub fn feature_name_table() -> Vec<u8> {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::with_capacity(names.len() * 48);
    for (kind, bit, name) in names {
        out.extend_from_slice(&[kind, bit]);
        out.extend_from_slice(name.as_bytes());
        out.resize(out.len().next_multiple_of(48), 0);
    }
    out
}

fn be_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    if bytes.len() < at + 4 {
        return Err(bad("qcow2 header too short"));
    }
    Ok(be32(bytes, at))
}

fn text(bytes: &[u8], what: &str) -> io::Result<String> {
    if bytes.len() > MAX_NAME {
        return Err(bad(format!("{what} too long")));
    }
    // A name that is padded with zero bytes is the name before them.
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes[..end].to_vec()).map_err(|_| bad(format!("{what} is not valid UTF-8")))
}

#[cfg(test)]
#[path = "header_test.rs"]
mod tests;
