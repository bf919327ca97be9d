use super::*;

fn good() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 1 << 30,
        crypt: Crypt::None,
        l1_size: 2,
        l1_offset: 0x30000,
        reftable_offset: 0x10000,
        reftable_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: COMPAT_LAZY_REFCOUNTS,
        autoclear: 0,
        refcount_order: 4,
        compression: Compression::Zlib,
        unknown_fields: vec![1, 2, 3, 4, 5, 6, 7, 8],
        backing_file: Some("base.img".into()),
        backing_format: Some("raw".into()),
        data_file: None,
        bitmaps: None,
        crypto: None,
        feature_names: Some(feature_name_table()),
        unknown_extensions: vec![(0x1234_5678, b"what is it".to_vec())],
    }
}

fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = good().to_bytes().unwrap();
    change(&mut bytes);
    Header::parse(&bytes).unwrap_err().to_string()
}

#[test]
fn headers_survive_both_ways_with_what_is_unknown() {
    let h = good();
    assert_eq!(Header::parse(&h.to_bytes().unwrap()).unwrap(), h);
    let v2 = Header { version: 2, compatible: 0, feature_names: None, unknown_fields: Vec::new(), ..good() };
    assert_eq!(v2.length(), 72);
    assert_eq!(Header::parse(&v2.to_bytes().unwrap()).unwrap(), v2);
    let ext = BitmapsExt { count: 3, size: 120, offset: 0x50000 };
    let bitmaps = Header { bitmaps: Some(ext), autoclear: AUTOCLEAR_BITMAPS, ..good() };
    assert_eq!(Header::parse(&bitmaps.to_bytes().unwrap()).unwrap(), bitmaps);
}

#[test]
fn unknown_incompatible_features_are_named() {
    assert_eq!(
        refusal(|b| {
            b[72] = 0x80;
            b[79] |= 0x20;
        }),
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000020"
    );
    let mut h = good();
    let mut names = h.feature_names.take().unwrap();
    names.extend([&[0u8, 5][..], b"time travel", &[0; 35]].concat());
    h.feature_names = Some(names);
    h.incompatible = 1 << 5;
    let error = Header::parse(&h.to_bytes().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "Unsupported qcow2 feature(s): time travel");
}

#[test]
fn broken_headers_are_refused_with_qemus_words() {
    assert_eq!(refusal(|b| b[0] = 0), "Image is not in qcow2 format");
    assert_eq!(refusal(|b| b[7] = 4), "Unsupported qcow2 version 4");
    assert_eq!(refusal(|b| b[23] = 8), "Unsupported cluster size: 2^8");
    assert_eq!(refusal(|b| b[23] = 22), "Unsupported cluster size: 2^22");
    assert_eq!(refusal(|b| b[103] = 96), "qcow2 header too short");
    assert_eq!(refusal(|b| b[99] = 7), "Reference count entry width too large; may not exceed 64 bits");
    assert_eq!(refusal(|b| b[35] = 3), "Unsupported encryption method 3");
    assert_eq!(refusal(|b| b[59] = 0), "Image does not contain a reference count table");
    assert_eq!(refusal(|b| b[55] = 1), "Reference count table offset invalid");
    assert_eq!(refusal(|b| b[56] = 1), "Reference count table too large");
    assert_eq!(refusal(|b| b[36] = 1), "Active L1 table too large");
    assert_eq!(refusal(|b| b[47] = 1), "Active L1 table offset invalid");
    assert_eq!(refusal(|b| b[39] = 1), "L1 table is too small");
    assert_eq!(refusal(|b| b[60] = 1), "Snapshot table too large");
    assert_eq!(refusal(|b| b[104] = 1), "qcow2: Compression type incompatible feature bit must be set");
    assert_eq!(refusal(|b| b[8] = 1), "Invalid backing file offset");
    assert_eq!(refusal(|b| b[18] = 9), "Backing file name too long");
    assert_eq!(refusal(|b| b.truncate(70)), "Image is not in qcow2 format");
}

/// Any bytes: an error or a header, never a panic.
#[test]
fn any_bytes() {
    let seed = 42;
    println!("seed {seed}");
    let mut rng = crate::block::testing::Rng(seed);
    for _ in 0..20_000 {
        let mut bytes = good().to_bytes().unwrap();
        for _ in 0..1 + rng.below(8) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.draw() as u8;
        }
        bytes.truncate(1 + rng.below(bytes.len() as u64 * 2) as usize);
        if let Ok(h) = Header::parse(&bytes) {
            let _ = h.to_bytes();
        }
    }
}
