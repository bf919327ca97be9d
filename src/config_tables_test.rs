use super::*;

#[test]
fn sizes_are_bytes_or_qemu_suffixes() {
    for (text, bytes) in [
        ("0", Some(0)),
        ("4096", Some(4096)),
        ("1K", Some(1024)),
        ("128M", Some(128 << 20)),
        ("1.5G", Some(3 << 29)),
        ("2t", Some(2 << 40)),
        ("0.5K", Some(512)),
        ("16E", None),
        ("1.", None),
        (".5K", None),
        ("1.5", None),
        ("1.0000000001G", None),
        ("-1", None),
        ("1KiB", None),
        ("", None),
        ("M", None),
        ("99999999999999999999", None),
        ("1 M", None),
    ] {
        assert_eq!(parse_size(text), bytes, "{text}");
    }
}

#[test]
fn a_uuid_has_one_form() {
    let uuid = parse_uuid("550e8400-e29b-41d4-A716-446655440000").unwrap();
    assert_eq!(uuid[..5], [0x55, 0x0e, 0x84, 0x00, 0xe2]);
    for bad in ["", "550e8400e29b41d4a716446655440000", "550e8400-e29b-41d4-a716-44665544000g", "é"] {
        assert_eq!(parse_uuid(bad), None, "{bad}");
    }
    assert_eq!(parse_uuid(&"é".repeat(18)), None);
    assert_eq!(parse_uuid("550e8400-e29b-41d4-a716-4466554400+1"), None);
}

#[test]
fn a_path_is_relative_to_the_file_and_a_protocol_is_no_path() {
    let dir = Path::new("vms/a");
    assert_eq!(relative_to(dir, "disk.raw"), "vms/a/disk.raw");
    assert_eq!(relative_to(dir, "/disk.raw"), "/disk.raw");
    assert_eq!(relative_to(dir, "nbd:unix:/x"), "nbd:unix:/x");
    assert_eq!(relative_to(dir, "./a:b"), "vms/a/./a:b");
    assert_eq!(relative_to(Path::new(""), "disk.raw"), "disk.raw");
}
