use super::*;
use crate::block::node::NodeOptions;
use crate::block::testing::{Mem, Rng};

const GEO: Geometry =
    Geometry { cluster_bits: 9, refcount_order: 4, extended: false, external: false, v3: true };
/// 64 granules of 4 KiB: one cluster of data.
const LEN: u64 = 1 << 18;

fn node(dir: &[u8]) -> std::sync::Arc<Node> {
    let mem = Mem::new(1 << 20);
    mem.state.data.lock().unwrap()[1024..1024 + dir.len()].copy_from_slice(dir);
    Node::new("file", Box::new(mem), NodeOptions::default())
}

fn list() -> Vec<Stored> {
    let one = |table, name: &str, in_use, auto| Stored {
        table,
        entries: 1,
        in_use,
        auto,
        granularity_bits: 12,
        name: name.into(),
    };
    vec![
        one(8192, "a", false, true),
        one(8704, "bb bb bb b", true, false),
        one(9216, &"x".repeat(1023), true, true),
    ]
}

fn ext(list: &[Stored]) -> BitmapsExt {
    BitmapsExt { count: list.len() as u32, size: bytes(list).len() as u64, offset: 1024 }
}

fn read_back(change: impl FnOnce(&mut Vec<u8>, &mut BitmapsExt)) -> io::Result<Vec<Stored>> {
    let (mut dir, mut ext) = (bytes(&list()), ext(&list()));
    change(&mut dir, &mut ext);
    read(&node(&dir), &GEO, LEN, &ext)
}

#[test]
fn what_is_written_is_read() {
    assert_eq!(read_back(|_, _| ()).unwrap(), list());
    let sizes: u64 = list().iter().map(|s| entry_size(s.name.len())).sum();
    assert_eq!(bytes(&list()).len() as u64, sizes);
}

#[test]
fn what_cannot_be_is_refused() {
    let put = |at: usize, value: &'static [u8]| {
        read_back(move |dir, _| dir[at..at + value.len()].copy_from_slice(value)).unwrap_err().to_string()
    };
    let unfit = "Bitmap 'a' doesn't satisfy the constraints";
    assert_eq!(put(0, &[0, 0, 0, 0, 0, 0, 0, 1]), unfit, "table not aligned");
    assert_eq!(put(0, &[0, 0, 0, 0, 0, 0, 0, 0]), unfit, "no table");
    assert_eq!(put(0, &[0xff; 8]), unfit, "table far away");
    assert_eq!(put(0, &[0, 0, 0, 0, 0, 0x20, 0, 0]), unfit, "table beyond the end");
    assert_eq!(put(8, &[0, 0, 0, 0]), unfit, "no entries");
    assert_eq!(put(8, &[0, 0, 0, 2]), unfit, "more entries than the disk needs");
    assert_eq!(put(8, &[0xff; 4]), unfit, "absurd entries");
    assert_eq!(put(12, &[0, 0, 0, 4]), unfit, "unknown flag");
    assert_eq!(put(16, &[2]), unfit, "unknown type");
    assert_eq!(put(17, &[8]), unfit, "too fine");
    assert_eq!(put(17, &[32]), unfit, "too coarse");
    assert_eq!(put(18, &[8, 0]), "Broken bitmap directory", "name longer than the directory");
    assert_eq!(put(20, &[0, 0, 0, 1]), "Bitmap extra data is not supported");
    let e = read_back(|dir, _| dir.copy_within(..32, 32)).unwrap_err().to_string();
    assert_eq!(e, "Bitmap already exists: a");
    let e = read_back(|_, ext| ext.size = 0).unwrap_err().to_string();
    assert_eq!(e, "Requested bitmap directory size is zero");
    let e = read_back(|_, ext| ext.size = u64::MAX).unwrap_err().to_string();
    assert_eq!(e, "Requested bitmap directory size is too big");
    let e = read_back(|_, ext| ext.offset = 1 << 20).unwrap_err().to_string();
    assert_eq!(e, "The bitmap directory lies beyond the end of the file");
    let e = read_back(|_, ext| ext.count = 4).unwrap_err().to_string();
    assert_eq!(e, "Less bitmaps found than specified in header extension");
    let e = read_back(|_, ext| ext.count = 2).unwrap_err().to_string();
    assert_eq!(e, "More bitmaps found than specified in header extension");
}

#[test]
fn tables_are_checked() {
    let node = node(&[]);
    let try_entry = |entry: u64| {
        super::super::meta::write_all(&node, 8192, &entry.to_be_bytes()).unwrap();
        read_table(&node, &GEO, &list()[0]).map(|t| t[0])
    };
    for good in [0, 1, 512, 512 * 2047] {
        assert_eq!(try_entry(good).unwrap(), good);
    }
    for bad in [2, 513, 512 * 2048, 1 << 56, 1 << 55, 768, u64::MAX] {
        assert!(try_entry(bad).is_err(), "{bad:#x}");
    }
}

/// Nothing that is in such a place makes it panic, or take long.
#[test]
fn any_bytes_do_no_harm() {
    let mut rng = Rng(77);
    let good = bytes(&list());
    for _ in 0..20_000 {
        let mut dir = good.clone();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(64) as usize;
            dir[at] = [0, 1, 0xff, rng.draw() as u8][rng.below(4) as usize];
        }
        let mut ext = ext(&list());
        if rng.below(4) == 0 {
            ext.size = rng.below(good.len() as u64 + 9);
        }
        if let Ok(list) = read(&node(&dir), &GEO, LEN, &ext) {
            list.iter().for_each(|s| drop(read_table(&node(&dir), &GEO, s)));
        }
    }
}
