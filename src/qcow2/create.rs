//! New images, with the options of `qemu-img create -f qcow2`.
//!
//! Owns: the first layout: header, refcount table, one or more refcount blocks, L1 table. Never:
//! opens or creates files: it gets an empty node. Threads: any one. Locks: none.

use super::crypt::CreateEncrypt;
use super::crypt_luks;
use super::header::{self, Compression, Crypt, Header, MAX_L1_BYTES, MAX_NAME};
use super::meta::write_all;
use super::open;
pub use super::prealloc::Preallocation;
use super::types::refcount_set;
use crate::block::driver::Driver;
use crate::block::node::{Edge, Node};
use std::io;
use std::sync::Arc;

/// `BlockdevCreateOptionsQcow2`, with QEMU's defaults ([`Default`]).
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes.
    pub size: u64,
    /// 2 (`v2`, compat 0.10) or 3 (`v3`, compat 1.1).
    pub version: u32,
    /// `cluster-size` in bytes.
    pub cluster_size: u64,
    /// `refcount-bits`.
    pub refcount_bits: u32,
    /// `backing-file`: the name to record.
    pub backing_file: Option<String>,
    /// `backing-fmt`: the format to record.
    pub backing_format: Option<String>,
    /// `lazy-refcounts`.
    pub lazy_refcounts: bool,
    /// `extended-l2`.
    pub extended_l2: bool,
    /// `compression-type`.
    pub compression: Compression,
    /// `data-file`: the name to record; the image then needs an external data file.
    pub data_file: Option<String>,
    /// `data-file-raw`.
    pub data_file_raw: bool,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// `encrypt`.
    pub encrypt: Option<CreateEncrypt>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            backing_file: None,
            backing_format: None,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            encrypt: None,
        }
    }
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

/// Checks options as QEMU does, with its texts; answers the header without tables.
fn plan(o: &CreateOptions) -> io::Result<Header> {
    if !o.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&o.cluster_size) {
        return Err(invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    if o.version != 2 && o.version != 3 {
        return Err(invalid(format!("Unsupported qcow2 version {}", o.version)));
    }
    if o.extended_l2 {
        if o.version < 3 {
            return Err(invalid(
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        if o.cluster_size < 16384 {
            return Err(invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
    }
    if !o.size.is_multiple_of(512) {
        return Err(invalid("Image size must be a multiple of 512 bytes"));
    }
    if o.refcount_bits > 64 || !o.refcount_bits.is_power_of_two() {
        return Err(invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if o.version < 3 {
        if o.lazy_refcounts {
            return Err(invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        if o.refcount_bits != 16 {
            return Err(invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            ));
        }
        if o.compression != Compression::Zlib {
            return Err(invalid(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        if o.data_file.is_some() {
            return Err(invalid(
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
    }
    if o.preallocation != Preallocation::Off && o.backing_file.is_some() && !o.extended_l2 {
        return Err(invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ));
    }
    if o.data_file_raw && o.data_file.is_none() {
        return Err(invalid("data-file-raw requires data-file"));
    }
    if o.data_file_raw && o.backing_file.is_some() {
        return Err(invalid("Backing file and data-file-raw cannot be used at the same time"));
    }
    if o.data_file_raw && o.encrypt.is_some() {
        return Err(invalid(
            "'data-file-raw' and encryption exclude each other: the data file would be no raw image",
        ));
    }
    if o.backing_format.is_some() && o.backing_file.is_none() {
        return Err(invalid("Backing format cannot be used without backing file"));
    }
    if [&o.backing_file, &o.data_file].iter().any(|n| n.as_ref().is_some_and(|n| n.len() > MAX_NAME)) {
        return Err(invalid("File name too long"));
    }
    let mut incompatible = 0;
    if o.data_file.is_some() {
        incompatible |= header::INCOMPAT_DATA_FILE;
    }
    if o.compression != Compression::Zlib {
        incompatible |= header::INCOMPAT_COMPRESSION;
    }
    if o.extended_l2 {
        incompatible |= header::INCOMPAT_EXTENDED_L2;
    }
    let mut h = Header {
        version: o.version,
        cluster_bits: o.cluster_size.trailing_zeros(),
        size: o.size,
        crypt: o.encrypt.as_ref().map_or(Crypt::None, |e| e.method),
        l1_size: 0,
        l1_offset: 0,
        reftable_offset: 0,
        reftable_clusters: 0,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible: if o.lazy_refcounts { header::COMPAT_LAZY_REFCOUNTS } else { 0 },
        autoclear: if o.data_file_raw { header::AUTOCLEAR_DATA_FILE_RAW } else { 0 },
        refcount_order: o.refcount_bits.trailing_zeros(),
        compression: o.compression,
        unknown_fields: Vec::new(),
        backing_file: o.backing_file.clone(),
        backing_format: o.backing_format.clone(),
        data_file: o.data_file.clone(),
        bitmaps: None,
        // Its place is known later.
        crypto: o.encrypt.as_ref().filter(|e| e.method == Crypt::Luks).map(|_| (0, 0)),
        // In small clusters it would leave no room for anything else.
        feature_names: (o.version >= 3 && o.cluster_size > 4096).then(header::feature_name_table),
        unknown_extensions: Vec::new(),
    };
    // QEMU makes the image empty first, and then as long as it is to be.
    let longest = i64::MAX as u64 & !((1 << 30) - 1);
    if o.size > i64::MAX as u64 {
        return Err(invalid("Could not resize image: Image size cannot be negative"));
    }
    if o.size > longest {
        let size = o.size;
        return Err(invalid(format!("Could not resize image: offset({size}) exceeds maximum({longest})")));
    }
    let entries = h.geometry().l1_entries(o.size);
    if entries * 8 > MAX_L1_BYTES {
        return Err(invalid("Could not resize image: Failed to grow the L1 table: File too large"));
    }
    h.l1_size = entries as u32;
    if h.to_bytes().is_err() {
        // Small clusters: the table is for people only.
        h.feature_names = None;
    }
    h.to_bytes()?;
    Ok(h)
}

/// Writes a new image into `file`, which is made empty first. `data_file` is the external data
/// file, if the options name one; it gets the disk's length. The header comes last, so that a
/// torn creation is no image.
///
/// # Errors
/// QEMU's text for options that cannot be; I/O errors.
pub fn create(file: &Arc<Node>, data_file: Option<&Arc<Node>>, options: &CreateOptions) -> io::Result<()> {
    if options.data_file.is_some() != data_file.is_some() {
        return Err(invalid("An external data file must be both named and opened"));
    }
    write_layout(file, options)?;
    if let Some(data) = data_file {
        data.resize(options.size)?;
    }
    // A raw data file is good by itself only if no table says otherwise.
    let how = match options.preallocation {
        Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
        how => how,
    };
    if how != Preallocation::Off {
        let edge = |role: &str, node: &Arc<Node>| Edge::new(role, Some(node.clone()));
        let image = open::open(
            edge("file", file),
            Edge::new("backing", None),
            data_file.map(|node| edge("data-file", node)),
            open::Options { encrypt: options.encrypt.as_ref().map(|e| e.unlock()), ..Default::default() },
        )?;
        image.preallocate(0..options.size, how)?;
        image.close()?;
    }
    Ok(())
}

fn write_layout(file: &Node, options: &CreateOptions) -> io::Result<()> {
    let mut h = plan(options)?;
    let luks = match &options.encrypt {
        Some(e) if e.method == Crypt::Luks => crypt_luks::format(e)?,
        Some(_) => crypt_luks::available().map(|()| Vec::new())?,
        None => Vec::new(),
    };
    let geo = h.geometry();
    let size = geo.cluster_size();
    // Layout: header, refcount table (1 cluster), refcount blocks, L1 table, LUKS header.
    let luks_clusters = geo.round_up(luks.len() as u64) >> geo.cluster_bits;
    let l1_clusters = geo.round_up(u64::from(h.l1_size) * 8) >> geo.cluster_bits;
    let rest = l1_clusters + luks_clusters;
    let mut blocks = 1;
    let mut table = 1;
    while (1 + table + blocks + rest).div_ceil(1 << geo.block_bits()) > blocks
        || (blocks * 8).div_ceil(size) > table
    {
        blocks = (1 + table + blocks + rest).div_ceil(1 << geo.block_bits()).max(blocks);
        table = (blocks * 8).div_ceil(size).max(table);
    }
    h.reftable_offset = size;
    h.reftable_clusters = table as u32;
    let first_block = (1 + table) * size;
    h.l1_offset = if h.l1_size == 0 { 0 } else { first_block + blocks * size };
    let used = 1 + table + blocks + rest;
    if !luks.is_empty() {
        h.crypto = Some((first_block + (blocks + l1_clusters) * size, luks.len() as u64));
    }
    let header = h.to_bytes()?;
    file.resize(0)?;
    file.resize(used * size)?;
    let mut bytes: Vec<u8> = (0..blocks).flat_map(|i| (first_block + i * size).to_be_bytes()).collect();
    bytes.resize((table * size) as usize, 0);
    write_all(file, size, &bytes)?;
    for i in 0..blocks {
        let mut block = vec![0; size as usize];
        let here = (used - (i << geo.block_bits())).min(1 << geo.block_bits());
        (0..here as usize).for_each(|k| refcount_set(&mut block, h.refcount_order, k, 1));
        write_all(file, first_block + i * size, &block)?;
    }
    if let Some((offset, _)) = h.crypto {
        write_all(file, offset, &luks)?;
    }
    write_all(file, 0, &header)?;
    file.flush()
}
