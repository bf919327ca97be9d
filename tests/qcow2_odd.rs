//! qcow2 images that are odd or hostile in ways that no image maker's are, and files larger than any disk here: made by
//! hand, in memory, in a file that has holes.

use minivmm::block::driver::{Driver, Extent, ExtentKind, Flags, Internal, Preallocation, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::qcow2::create::{self, CreateOptions};
use minivmm::qcow2::header::{AUTOCLEAR_BITMAPS, BitmapsExt, Header};
use minivmm::qcow2::open::Options;
use minivmm::qcow2::{Qcow2, open};
use minivmm::sys::iov::{Iov, IovMut};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

#[path = "support/qcow2.rs"]
mod support;
use support::{Disk, Op, edge, fresh, fresh_pair, open_image, open_pair, read, write};

const PAGE: u64 = 4096;

/// A file of any length in memory, of which only what was written takes any.
#[derive(Default)]
struct Sparse {
    pages: Mutex<BTreeMap<u64, Vec<u8>>>,
    len: AtomicU64,
    /// A read of this place fails, once (0: none does),
    broken: AtomicU64,
    /// after so many that do not.
    good: AtomicU64,
    /// Bytes that were read.
    read: AtomicU64,
}

struct OnSparse(Arc<Sparse>);

impl Driver for OnSparse {
    fn name(&self) -> &'static str {
        "sparse"
    }
    fn len(&self) -> u64 {
        self.0.len.load(Ordering::SeqCst)
    }
    fn grows(&self) -> bool {
        true
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        if off != 0 && self.0.broken.load(Ordering::SeqCst) == off {
            let less = |n: u64| n.checked_sub(1);
            if self.0.good.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_err() {
                self.0.broken.store(0, Ordering::SeqCst);
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        self.0.read.fetch_add(to.len() as u64, Ordering::SeqCst);
        let pages = self.0.pages.lock().unwrap();
        let mut pos = 0;
        while pos < to.len() {
            let at = off + pos as u64;
            let n = ((PAGE - at % PAGE) as usize).min(to.len() - pos);
            match pages.get(&(at / PAGE)) {
                Some(page) => to.copy_from(pos, &page[(at % PAGE) as usize..][..n]),
                None => to.fill(pos, n, 0),
            }
            pos += n;
        }
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        let mut pages = self.0.pages.lock().unwrap();
        for (at, byte) in (off..).zip(from.to_vec()) {
            let page = pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
            page[(at % PAGE) as usize] = byte;
        }
        self.0.len.fetch_max(off + from.len() as u64, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn resize(&self, len: u64) -> io::Result<()> {
        self.0.pages.lock().unwrap().retain(|page, _| page * PAGE < len);
        self.0.len.store(len, Ordering::SeqCst);
        Ok(())
    }
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let pages = self.0.pages.lock().unwrap();
        let next = pages.range(off / PAGE..).next().map_or(u64::MAX, |(page, _)| page * PAGE);
        Ok(match next > off {
            true => Extent { kind: ExtentKind::Zero, len: len.min(next - off), host_offset: None },
            false => {
                Extent { kind: ExtentKind::Data, len: len.min(PAGE - off % PAGE), host_offset: Some(off) }
            }
        })
    }
}

impl Sparse {
    fn node(self: &Arc<Self>) -> Arc<Node> {
        Node::new("file", Box::new(OnSparse(self.clone())), NodeOptions::default())
    }

    fn image(options: &CreateOptions) -> Arc<Sparse> {
        let file = Arc::new(Sparse::default());
        create::create(&file.node(), None, options).expect("create");
        file
    }

    fn put(self: &Arc<Self>, off: u64, bytes: &[u8]) {
        write(&OnSparse(self.clone()), off, bytes).unwrap();
    }

    fn header(self: &Arc<Self>) -> Header {
        Header::parse(&read(&OnSparse(self.clone()), 0, 65536).unwrap()).expect("header")
    }

    fn open(self: &Arc<Self>, options: Options) -> io::Result<Qcow2> {
        open::open(edge("file", self.node()), Edge::new("backing", None), None, options)
    }
}

fn sound(image: &Qcow2) {
    let report = image.check().expect("check");
    assert!(report.errors.is_empty(), "{:?}", report.errors);
}

/// Where the data of the disk's first cluster are.
fn first_data(image: &Qcow2) -> u64 {
    image.status(0, 512).unwrap().host_offset.expect("allocated")
}

#[test]
fn a_cluster_behind_the_end_of_the_file_keeps_what_is_written() {
    let disk = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 65536]).unwrap();
    image.close().unwrap();
    // Somebody cut the file: the cluster is allocated, and reads as zeroes.
    let at = first_data(&image);
    disk.bytes.lock().unwrap().truncate(at as usize);
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(read(&image, 0, 512).unwrap(), [0; 512]);
    write(&image, 4096, &[2; 4096]).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert!(read(&image, 4096, 4096).unwrap() == [2; 4096], "the write is lost");
    sound(&image);
}

#[test]
fn beyond_what_a_descriptor_can_say_nothing_is_compressed() {
    // With clusters of 2 MiB a descriptor has 49 bits of offset.
    const END: u64 = 1 << 49;
    let options = CreateOptions { size: 16 << 20, cluster_size: 2 << 20, ..CreateOptions::default() };
    let file = Sparse::image(&options);
    let header = file.header();
    let mut block = [0; 8];
    OnSparse(file.clone()).read(header.reftable_offset, &mut IovMut::from_slice(&mut block)).unwrap();
    // The first refcount block's part of the file is full, and the file ends far behind.
    file.put(u64::from_be_bytes(block), &[0, 1].repeat(1 << 20));
    file.put(header.reftable_offset + 8 * (END >> 41), &END.to_be_bytes());
    file.put(END, &[0, 1]);
    file.len.store(END + (2 << 20), Ordering::SeqCst);
    let image = file.open(Options::default()).unwrap();
    let data = vec![0x5a; 2 << 20];
    image.write(0, &Iov::from_slice(&data), Flags::COMPRESSED).unwrap();
    image.write(2 << 20, &Iov::from_slice(&data), Flags::NONE).unwrap();
    image.close().unwrap();
    let image = file.open(Options::default()).unwrap();
    assert!(first_data(&image) > END);
    assert!(read(&image, 0, 2 << 20).unwrap() == data && read(&image, 2 << 20, 2 << 20).unwrap() == data);
    sound(&image);
}

/// After a growth whose last sync failed the header on disk may name the new L1 table already: what is written there
/// later must not come before what it points to.
#[test]
fn a_table_that_moved_twice_waits_for_its_refcounts() {
    let options = CreateOptions { size: 64 << 10, cluster_size: 512, ..CreateOptions::default() };
    for nth in 1..40 {
        let disk = fresh(&options);
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, 0, &[1; 512]).unwrap();
        image.flush().unwrap();
        disk.fail_after.store(nth, Ordering::SeqCst);
        disk.fail_once.store(true, Ordering::SeqCst);
        let grown = image.resize(8 << 20).is_ok();
        if disk.fail_after.swap(0, Ordering::SeqCst) != 0 {
            assert!(grown, "nothing failed");
            assert!(nth > 5, "the growth has few steps");
            break;
        }
        write(&image, 40 << 10, &[2; 512]).unwrap();
        let mut synced = disk.copy();
        *disk.log.lock().unwrap() = Some(Vec::new());
        image.flush().unwrap();
        let log = disk.log.lock().unwrap().take().unwrap();
        for part in log.split(|op| matches!(op, Op::Sync)) {
            for op in part {
                let mut bytes = synced.clone();
                if let Op::Write(off, data) = op {
                    bytes[*off as usize..*off as usize + data.len()].copy_from_slice(data);
                }
                let after =
                    open_image(&Disk::new(bytes), None, Options { read_only: true, ..Options::default() });
                let report = after.unwrap().check().unwrap();
                assert!(report.errors.is_empty(), "step {nth} failed: {:?}", report.errors);
            }
            for op in part {
                if let Op::Write(off, data) = op {
                    synced[*off as usize..*off as usize + data.len()].copy_from_slice(data);
                }
            }
        }
    }
}

/// What a failed operation left to be rebuilt frees clusters that nobody named: compressed data must not go on being put
/// where others were.
#[test]
fn compressed_data_are_not_put_into_a_cluster_that_was_given_up() {
    const TABLE: u64 = 32 << 10;
    let options = CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() };
    let file = Sparse::image(&options);
    let image = file.open(Options { l2_cache_size: Some(512), ..Options::default() }).unwrap();
    let snapshot = |name: &str| Snapshot { name: name.into(), ..Snapshot::default() };
    image.create_snapshot(snapshot("empty")).unwrap();
    (0..31).for_each(|i| write(&image, i * TABLE, &[1; 512]).unwrap());
    let packed = |off: u64, byte: u8| {
        image.write(off, &Iov::from_slice(&[byte; 512]), Flags::COMPRESSED).unwrap();
        assert_eq!(image.status(off, 512).unwrap().host_offset, None, "it is compressed");
    };
    packed(31 * TABLE, 2);
    image.flush().unwrap();
    // Back to the snapshot; when that has happened, the first of the old tables cannot be read. (It is read before, when
    // it is looked through.)
    file.good.store(1, Ordering::SeqCst);
    let mut entry = [0; 8];
    OnSparse(file.clone()).read(file.header().l1_offset, &mut IovMut::from_slice(&mut entry)).unwrap();
    file.broken.store(u64::from_be_bytes(entry) & (u64::MAX >> 8), Ordering::SeqCst);
    image.apply_snapshot(None, Some("empty")).unwrap();
    assert_eq!(file.broken.load(Ordering::SeqCst), 0, "nothing failed");
    // The old snapshot table lies in front of all that: from there on holes are filled.
    image.create_snapshot(snapshot("later")).unwrap();
    let data = [3; 512 * 100];
    write(&image, 0, &data).unwrap();
    packed(31 * TABLE, 4);
    packed(30 * TABLE, 5);
    assert!(read(&image, 0, data.len()).unwrap() == data, "somebody's data are where others' are");
    image.close().unwrap();
    let image = file.open(Options::default()).unwrap();
    assert!(read(&image, 0, data.len()).unwrap() == data, "somebody's data are where others' are");
    assert_eq!(read(&image, 31 * TABLE, 512).unwrap(), [4; 512]);
    assert_eq!(read(&image, 30 * TABLE, 512).unwrap(), [5; 512]);
    sound(&image);
}

/// Refcounts of every width count up to their end and not around it.
#[test]
fn a_snapshot_too_many_for_the_refcounts_is_refused() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = CreateOptions { size: 1 << 20, refcount_bits: bits, ..CreateOptions::default() };
        let disk = fresh(&options);
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, 0, &[1; 65536]).unwrap();
        // The disk itself is one.
        let most = (1u64 << bits.min(8)) - 2;
        for n in 0..most {
            let snapshot = Snapshot { name: format!("{n}"), ..Snapshot::default() };
            image.create_snapshot(snapshot).unwrap_or_else(|e| panic!("{bits} bits, snapshot {n}: {e}"));
        }
        let one_more = image.create_snapshot(Snapshot { name: "last".into(), ..Snapshot::default() });
        match bits {
            1 => assert_eq!(one_more.unwrap_err().raw_os_error(), Some(libc::ENOTSUP)),
            2..=8 => assert_eq!(one_more.unwrap_err().kind(), io::ErrorKind::InvalidInput),
            _ => one_more.unwrap(),
        }
        assert_eq!(image.snapshots().unwrap().len() as u64, most + u64::from(bits > 8));
        sound(&image);
        // It is the disk's own again after a write, and the snapshots keep the old one.
        write(&image, 0, &[2; 65536]).unwrap();
        if most > 0 {
            image.apply_snapshot(None, Some("0")).unwrap();
            assert!(read(&image, 0, 65536).unwrap() == [1; 65536]);
        }
        image.close().unwrap();
        sound(&image);
    }
}

fn patch(disk: &Disk, at: u64, bytes: &[u8]) {
    disk.bytes.lock().unwrap()[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

fn word(disk: &Disk, at: u64) -> u64 {
    u64::from_be_bytes(disk.bytes.lock().unwrap()[at as usize..at as usize + 8].try_into().unwrap())
}

/// An image with a snapshot, and where the entry of that is.
fn with_snapshot(size: u64) -> (Arc<Disk>, u64) {
    let disk = fresh(&CreateOptions { size, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 65536]).unwrap();
    image.create_snapshot(Snapshot { name: "s".into(), ..Snapshot::default() }).unwrap();
    image.close().unwrap();
    let at = word(&disk, 64);
    (disk, at)
}

#[test]
fn a_used_cluster_with_refcount_0_ends_writing() {
    let disk = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 65536]).unwrap();
    image.close().unwrap();
    let cluster = first_data(&image) >> 16;
    let block = word(&disk, word(&disk, 48));
    patch(&disk, block + 2 * cluster, &[0, 0]);
    let image = open_image(&disk, None, Options::default()).unwrap();
    image.discard(0, 65536).unwrap();
    assert!(image.flush().is_err());
    assert_eq!(write(&image, 0, &[2; 512]).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(disk.copy()[79] & 2, 2, "the corrupt bit");
    assert!(open_image(&disk, None, Options::default()).is_err());
}

/// Where metadata are in the image: what a snapshot's tables must not name.
fn metadata(disk: &Disk, snapshot: u64) -> [(&'static str, u64); 5] {
    let reftable = word(disk, 48);
    [
        ("refcount block", word(disk, reftable)),
        ("refcount table", reftable),
        ("L1 table", word(disk, 40)),
        ("snapshot table", snapshot),
        ("snapshot's L1 table", word(disk, snapshot)),
    ]
}

/// What `act` does to an image in which the entry at `entry` of a snapshot's table names metadata: nothing but the
/// corrupt bit.
fn refuses(disk: &Disk, entry: u64, act: &dyn Fn(&Qcow2) -> io::Result<()>) {
    for (what, place) in metadata(disk, word(disk, 64)) {
        let bad = Disk::new(disk.copy());
        let flags = word(&bad, entry) >> 56 << 56;
        patch(&bad, entry, &(flags | place).to_be_bytes());
        let before = bad.copy();
        let image = open_image(&bad, None, Options::default()).unwrap();
        assert_eq!(act(&image).unwrap_err().raw_os_error(), Some(libc::EIO), "{what}");
        assert_eq!(write(&image, 0, &[2; 512]).unwrap_err().raw_os_error(), Some(libc::EIO), "{what}");
        let _ = image.close();
        let mut after = bad.copy();
        assert_eq!(after[79] & 2, 2, "the corrupt bit: {what}");
        // The bits for corrupt and dirty.
        after[79] = before[79];
        assert!(after[..before.len()] == before, "{what}");
        let image = open_image(&bad, None, Options { read_only: true, ..Options::default() }).unwrap();
        assert_eq!(image.snapshots().unwrap().len(), 1);
        assert!(read(&image, 0, 512).unwrap() == [3; 512]);
    }
}

#[test]
fn a_snapshot_whose_tables_name_metadata_is_left_alone() {
    let (disk, at) = with_snapshot(2 << 29);
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[3; 65536]).unwrap();
    image.close().unwrap();
    let l1 = word(&disk, at);
    let l2 = word(&disk, l1);
    assert_ne!(l2, word(&disk, word(&disk, 40)) & (u64::MAX >> 8), "the snapshot has a table of its own");
    let delete = |image: &Qcow2| image.delete_snapshot(None, Some("s")).map(drop);
    let apply = |image: &Qcow2| image.apply_snapshot(None, Some("s"));
    for entry in [l1, l1 + 8, l2, l2 + 8] {
        refuses(&disk, entry, &delete);
        refuses(&disk, entry, &apply);
    }
    // What the disk itself has is given up when a snapshot is applied, and shared when one is taken.
    let own = word(&disk, word(&disk, 40)) & (u64::MAX >> 8);
    refuses(&disk, own + 8, &apply);
    refuses(&disk, own + 8, &|image| {
        image.create_snapshot(Snapshot { name: "t".into(), ..Snapshot::default() })
    });
}

/// Where the refcount of cluster `k` is, of 16 bits.
fn refcount_at(disk: &Disk, k: u64, cluster_size: u64) -> u64 {
    word(disk, word(disk, 48) + 8 * (k / (cluster_size / 2))) + 2 * (k % (cluster_size / 2))
}

/// Opens the image, in which a cluster in use is called free, and allocates: that is refused, and nothing is lost.
fn is_not_handed_out(disk: &Arc<Disk>, at: u64) {
    let before = disk.copy();
    let image = open_image(disk, None, Options::default()).unwrap();
    assert_eq!(write(&image, at, &[7; 512]).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(write(&image, at, &[7; 512]).unwrap_err().raw_os_error(), Some(libc::EIO));
    let _ = image.close();
    let mut after = disk.copy();
    assert_eq!(after[79] & 2, 2, "the corrupt bit");
    after[79] = before[79];
    assert!(after[..before.len()] == before, "something was written");
    assert!(open_image(disk, None, Options::default()).is_err());
}

#[test]
fn a_used_cluster_with_refcount_0_is_not_handed_out() {
    // It is in a table that nobody has looked at.
    let disk = fresh(&CreateOptions { size: 2 << 29, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 1 << 29, &[1; 65536]).unwrap();
    write(&image, 0, &[2; 65536]).unwrap();
    image.close().unwrap();
    let k = image.status(1 << 29, 512).unwrap().host_offset.unwrap() >> 16;
    let good = refcount_at(&disk, k, 65536);
    patch(&disk, good, &[0, 0]);
    is_not_handed_out(&disk, 1 << 20);
}

#[test]
fn a_snapshots_cluster_with_refcount_0_is_not_handed_out() {
    let disk = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    image.write(0, &Iov::from_slice(&[1; 65536]), Flags::COMPRESSED).unwrap();
    image.create_snapshot(Snapshot { name: "s".into(), ..Snapshot::default() }).unwrap();
    write(&image, 0, &[2; 65536]).unwrap();
    image.close().unwrap();
    let l2 = word(&disk, word(&disk, word(&disk, 64)));
    let k = (word(&disk, l2) & ((1 << 54) - 1)) >> 16;
    patch(&disk, refcount_at(&disk, k, 65536), &[0, 0]);
    is_not_handed_out(&disk, 1 << 19);
}

#[test]
fn a_used_cluster_without_a_refcount_block_is_not_handed_out() {
    let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    (0..512).for_each(|i| write(&image, i * 1024, &[1; 512]).unwrap());
    image.close().unwrap();
    let reftable = word(&disk, 48);
    assert_ne!(word(&disk, reftable + 16), 0);
    (2..8).for_each(|i| patch(&disk, reftable + 8 * i, &[0; 8]));
    is_not_handed_out(&disk, 512);
}

/// All of it in memory would be more than there is.
#[test]
fn l1_tables_of_snapshots_in_holes_cost_nothing() {
    let file = Sparse::image(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let (count, len) = (8, 32 << 20);
    let entries = (1..=count).flat_map(|i: u64| {
        let mut entry = [0; 40];
        entry[..8].copy_from_slice(&(i * len).to_be_bytes());
        entry[8..12].copy_from_slice(&(len as u32 / 8).to_be_bytes());
        entry
    });
    file.put(1 << 20, &entries.collect::<Vec<u8>>());
    file.put(60, &(count as u32).to_be_bytes());
    file.put(64, &(1u64 << 20).to_be_bytes());
    file.node().resize((count + 1) * len).unwrap();
    let image = file.open(Options::default()).unwrap();
    write(&image, 0, &[1; 512]).unwrap();
    let bytes = file.read.load(Ordering::SeqCst);
    assert!(bytes < 16 << 20, "{bytes} bytes were read");
    let _ = image.close();
}

#[test]
fn holes_of_a_sound_image_are_used() {
    for (cluster_size, extended_l2) in [(65536, false), (512, false), (16384, true)] {
        let options = CreateOptions { size: 4 << 20, cluster_size, extended_l2, ..CreateOptions::default() };
        let disk = fresh(&options);
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, 0, &[1; 2 << 20]).unwrap();
        image.write(2 << 20, &Iov::from_slice(&vec![2; cluster_size as usize]), Flags::COMPRESSED).unwrap();
        image.create_snapshot(Snapshot { name: "s".into(), ..Snapshot::default() }).unwrap();
        write(&image, 3 << 20, &[3; 1 << 19]).unwrap();
        image.zero(0, 1 << 19, Flags::NONE).unwrap();
        image.discard(3 << 20, 1 << 18).unwrap();
        image.close().unwrap();
        let len = disk.copy().len();
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, (3 << 20) + (1 << 19), &[4; 1 << 17]).unwrap();
        image.close().unwrap();
        // (Of many small clusters only so many are searched for one.)
        assert!(disk.copy().len() <= len + 4096, "the holes are not used");
        assert!(read(&image, (3 << 20) + (1 << 18), 1 << 18).unwrap() == [3; 1 << 18]);
        sound(&image);
    }
}

#[test]
fn a_snapshot_table_that_ends_behind_all_numbers_is_refused() {
    let (disk, at) = with_snapshot(1 << 20);
    patch(&disk, at, &0xffff_ffff_ffff_0000u64.to_be_bytes());
    patch(&disk, at + 8, &(1u32 << 14).to_be_bytes());
    let error = open_image(&disk, None, Options::default()).map(drop).unwrap_err();
    assert!(error.to_string().contains("snapshot table entry 0"), "{error}");
}

#[test]
fn a_snapshot_that_names_one_table_often_is_not_walked() {
    let (disk, at) = with_snapshot(8 << 29);
    let l1 = word(&disk, at);
    let first = word(&disk, l1);
    (1..8).for_each(|i| patch(&disk, l1 + 8 * i, &first.to_be_bytes()));
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert!(image.apply_snapshot(None, Some("s")).is_err());
    assert_eq!(disk.copy()[79] & 2, 2, "the corrupt bit");
}

#[test]
fn bitmap_tables_in_holes_cost_little() {
    let file = Sparse::image(&CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let (place, count) = (1u64 << 30, 64u32);
    let mut directory = Vec::new();
    for i in 0..count {
        directory.extend_from_slice(&((1 << 31) + u64::from(i) * (8 << 20)).to_be_bytes());
        directory.extend_from_slice(&(1u32 << 20).to_be_bytes());
        // In use; a kind of dirty tracking of 512 bytes, and a name of four letters.
        directory.extend_from_slice(&[0, 0, 0, 1, 1, 9, 0, 4, 0, 0, 0, 0]);
        directory.extend_from_slice(format!("{i:04}\0\0\0\0").as_bytes());
    }
    let mut header = file.header();
    header.bitmaps = Some(BitmapsExt { count, size: directory.len() as u64, offset: place });
    header.autoclear |= AUTOCLEAR_BITMAPS;
    file.put(0, &header.to_bytes().unwrap());
    file.put(place, &directory);
    file.len.store(1 << 32, Ordering::SeqCst);
    file.read.store(0, Ordering::SeqCst);
    let error = file.open(Options::default()).map(drop).unwrap_err();
    assert!(error.to_string().contains("entries"), "{error}");
    let bytes = file.read.load(Ordering::SeqCst);
    assert!(bytes < 1 << 20, "{bytes} bytes were read");
}

#[test]
fn the_repair_of_a_file_of_holes_reads_little() {
    const TABLES: u64 = 8192;
    let file = Sparse::image(&CreateOptions { size: TABLES << 29, ..CreateOptions::default() });
    let header = file.header();
    let l1: Vec<u8> =
        (0..TABLES).flat_map(|i| ((1u64 << 63) + (1 << 40) + (i << 16)).to_be_bytes()).collect();
    file.put(header.l1_offset, &l1);
    let blocks: Vec<u8> = (0..1000).flat_map(|i| ((1u64 << 41) + (i << 16)).to_be_bytes()).collect();
    file.put(header.reftable_offset + 8 * 2000, &blocks);
    file.put(79, &[1]);
    file.len.store(1 << 42, Ordering::SeqCst);
    file.read.store(0, Ordering::SeqCst);
    let image = file.open(Options::default()).expect("repaired");
    let bytes = file.read.load(Ordering::SeqCst);
    assert!(bytes < 16 << 20, "{bytes} bytes were read");
    sound(&image);
    write(&image, (TABLES << 29) - 512, &[7; 512]).unwrap();
    image.close().unwrap();
    let image = file.open(Options::default()).unwrap();
    assert_eq!(read(&image, (TABLES << 29) - 512, 512).unwrap(), [7; 512]);
    sound(&image);
}

#[test]
fn a_growth_that_fails_leaks_nothing() {
    let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for nth in 1..100 {
            let disk = fresh(&options);
            let image = open_image(&disk, None, Options::default()).unwrap();
            write(&image, 0, &[1; 65536]).unwrap();
            // So that what is preallocated is not at the end of the file.
            image.flush().unwrap();
            disk.fail_after.store(nth, Ordering::SeqCst);
            disk.fail_once.store(true, Ordering::SeqCst);
            let grown = image.resize_with(2 << 20, how);
            if disk.fail_after.swap(0, Ordering::SeqCst) != 0 {
                assert!(grown.is_ok() && nth > 3, "{grown:?}");
                break;
            }
            image.close().unwrap();
            let image = open_image(&disk, None, Options::default()).unwrap();
            let report = image.check().unwrap();
            assert!(report.errors.is_empty() && report.leaks == 0, "{how:?}, step {nth}: {report:?}");
            assert_eq!(read(&image, 0, 65536).unwrap(), [1; 65536]);
        }
    }
}

#[test]
fn a_data_file_that_cannot_shrink_is_no_failure() {
    let options = CreateOptions { size: 1 << 20, data_file: Some("d".into()), ..CreateOptions::default() };
    for nth in 1..5 {
        let (disk, outside) = fresh_pair(&options);
        let image = open_pair(&disk, &outside, None, Options::default()).unwrap();
        write(&image, 0, &[1; 65536]).unwrap();
        let data = outside.as_ref().unwrap();
        data.fail_after.store(nth, Ordering::SeqCst);
        let done = image.resize(65536);
        let failed = data.fail_after.swap(0, Ordering::SeqCst) == 1;
        // Done, or as before.
        assert_eq!(image.len(), if done.is_ok() { 65536 } else { 1 << 20 }, "step {nth}: {done:?}");
        if !failed {
            assert!(nth > 1, "nothing failed");
            return;
        }
    }
    panic!("a data file has few steps to take");
}

/// What the tests below need of an image with one allocated cluster: its L2 table, and where a
/// cluster's refcount (of 16 bits) is.
fn l2_and_refcount(disk: &Disk, k: u64) -> (u64, u64) {
    let table = word(disk, word(disk, 40)) & 0x00ff_ffff_ffff_fe00;
    (table, word(disk, word(disk, 48)) + 2 * k)
}

const COPIED: u64 = 1 << 63;

/// A run of zero clusters that call their places their own, the second of which is the place of
/// their own table.
#[test]
fn no_cluster_of_a_run_may_be_metadata() {
    let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 4096]).unwrap();
    image.close().unwrap();
    let (old, _) = l2_and_refcount(&disk, 0);
    let free = (disk.copy().len() as u64).next_multiple_of(4096);
    let table = free + 4096;
    let copy = disk.copy()[old as usize..old as usize + 4096].to_vec();
    write(&support::OnDisk(disk.clone()), table, &copy).unwrap();
    patch(&disk, word(&disk, 40), &(table | COPIED).to_be_bytes());
    patch(&disk, table + 8, &(free | COPIED | 1).to_be_bytes());
    patch(&disk, table + 16, &(table | COPIED | 1).to_be_bytes());
    let (_, refcount) = l2_and_refcount(&disk, free / 4096);
    patch(&disk, refcount, &[0, 1, 0, 1]);
    let before = disk.copy()[table as usize..].to_vec();
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(write(&image, 4096, &[7; 8192]).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(disk.copy()[table as usize..][..4096] == before[..4096], "guest data went over the L2 table");
    assert_eq!(disk.copy()[79] & 2, 2, "the corrupt bit");
}

/// A cluster with subclusters whose first is zeroes and whose place is `host`, over a backing file.
fn place_without_data(host: u64) -> (Arc<Disk>, Qcow2) {
    let options =
        CreateOptions { size: 1 << 20, cluster_size: 16384, extended_l2: true, ..CreateOptions::default() };
    let disk = fresh(&options);
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 16384]).unwrap();
    image.close().unwrap();
    let (table, refcount) = l2_and_refcount(&disk, host / 16384);
    let host = if host == 0 { table } else { host };
    patch(&disk, table, &(host | COPIED).to_be_bytes());
    patch(&disk, table + 8, &(1u64 << 32).to_be_bytes());
    patch(&disk, refcount, &[0, 1]);
    let backing = support::node(&Disk::new(vec![5; 1 << 20]));
    let image = open_image(&disk, Some(backing), Options::default()).unwrap();
    (disk, image)
}

#[test]
fn what_is_brought_up_goes_over_no_metadata() {
    let (disk, image) = place_without_data(0);
    let (table, _) = l2_and_refcount(&disk, 0);
    let before = disk.copy()[table as usize..][..16384].to_vec();
    assert_eq!(image.populate(0, 16384, false).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(disk.copy()[table as usize..][..16384] == before, "it went over the L2 table");
}

#[test]
fn what_is_brought_up_behind_the_end_of_the_file_stays() {
    let (_disk, image) = place_without_data(100 * 16384);
    image.populate(0, 16384, false).unwrap();
    // The file grows; it must not become shorter.
    write(&image, 16384, &[2; 16384]).unwrap();
    let expected = [vec![0; 512], vec![5; 16384 - 512], vec![2; 16384]].concat();
    assert!(read(&image, 0, 32768).unwrap() == expected, "what was brought up is lost");
    image.close().unwrap();
    assert!(read(&image, 0, 32768).unwrap() == expected, "what was brought up is lost at the end");
}

/// The data file ends where the disk does: a device, say, has no more.
#[test]
fn what_is_brought_up_does_not_go_behind_the_end_of_a_data_file() {
    for extended_l2 in [false, true] {
        let size = (1 << 20) + 512;
        let options =
            CreateOptions { size, data_file: Some("d".into()), extended_l2, ..CreateOptions::default() };
        let (disk, outside) = fresh_pair(&options);
        let backing = support::node(&Disk::new(vec![5; 2 << 20]));
        let image = open_pair(&disk, &outside, Some(backing), Options::default()).unwrap();
        image.populate(0, size, false).unwrap();
        image.close().unwrap();
        assert!(outside.unwrap().copy() == vec![5; size as usize]);
    }
}

/// An entry says that a cluster of the disk is where the L1 table is. Who discards it must not set that
/// table free, or the next cluster that is allocated goes over it.
#[test]
fn metadata_are_not_set_free_with_a_cluster() {
    type Give = fn(&Qcow2) -> io::Result<()>;
    let discard: Give = |image| image.discard(65536, 65536);
    let unmap: Give = |image| image.zero(65536, 65536, Flags::MAY_UNMAP);
    let shrink: Give = |image| image.resize(65536);
    let replace: Give = |image| write(image, 65536, &[3; 65536]);
    for (give, copied) in [(discard, COPIED), (unmap, COPIED), (shrink, COPIED), (replace, 0)] {
        let disk = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, 0, &[1; 65536]).unwrap();
        image.close().unwrap();
        let l1 = word(&disk, 40);
        let (table, _) = l2_and_refcount(&disk, 0);
        patch(&disk, table + 8, &(l1 | copied).to_be_bytes());
        let before = word(&disk, l1);
        let image = open_image(&disk, None, Options::default()).unwrap();
        let _ = give(&image);
        for n in 0..20 {
            let _ = image.flush();
            let _ = write(&image, 0, &[n; 65536]);
            let _ = image.discard(0, 65536);
        }
        let _ = image.close();
        assert_eq!(word(&disk, l1), before, "the L1 table");
        assert_eq!(disk.copy()[79] & 2, 2, "the corrupt bit");
    }
}
