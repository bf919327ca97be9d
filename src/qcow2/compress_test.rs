use super::*;

/// A stored deflate block of 5 bytes.
const STORED: [u8; 10] = [1, 5, 0, 0xfa, 0xff, b'h', b'e', b'l', b'l', b'o'];

#[test]
fn deflate_fills_a_cluster_and_ignores_what_follows() {
    let mut out = [0; 5];
    let data = [&STORED[..], &[0xaa; 20]].concat();
    decompress(Compression::Zlib, &data, &mut out).unwrap();
    assert_eq!(&out, b"hello");
}

#[test]
fn short_or_broken_data_are_errors() {
    assert!(decompress(Compression::Zlib, &STORED, &mut [0; 6]).is_err(), "too short");
    assert!(decompress(Compression::Zlib, &[7; 30], &mut [0; 5]).is_err());
    assert!(decompress(Compression::Zstd, &[7; 30], &mut [0; 5]).is_err());
    assert!(decompress(Compression::Zstd, &[], &mut [0; 5]).is_err());
}
