use super::*;
use crate::block::file_open::FilePlan;
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::node::Node;
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{NoEnv, Rng, Scratch};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

fn open_with(graph: &mut Graph, path: &str, common: Common) -> crate::error::Result<Arc<Node>> {
    let plan = Plan { common, driver: Box::new(FilePlan::new("file", path)) };
    let node = open::open(graph, &NoEnv, plan)?;
    graph.own(&node);
    Ok(node)
}

fn node(graph: &mut Graph, path: &str) -> Arc<Node> {
    open_with(graph, path, Common { unmap: Some(true), ..Common::default() }).unwrap()
}

fn write(node: &Node, off: u64, data: &[u8]) {
    node.write(off, &Iov::from_slice(data), Flags::NONE).unwrap();
}

fn read(node: &Node, off: u64, len: usize) -> Vec<u8> {
    let mut v = vec![0xEE; len];
    node.read(off, &mut IovMut::from_slice(&mut v)).unwrap();
    v
}

fn access_mode(node: &Node) -> i32 {
    let path = node.driver.filename();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let data: Vec<_> = fds
        .filter(|e| std::fs::read_link(e.path()).is_ok_and(|p| p.to_str() == Some(&path)))
        .map(|e| {
            let info = format!("/proc/self/fdinfo/{}", e.file_name().to_str().unwrap());
            let text = std::fs::read_to_string(info).unwrap();
            let flags = text.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
            i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_ACCMODE
        })
        .collect();
    data.into_iter().max().unwrap()
}

#[test]
fn what_is_written_is_in_the_file() {
    let dir = Scratch::new("file-rw");
    let path = dir.file("a", 1000);
    let mut graph = Graph::new();
    let n = node(&mut graph, &path);
    assert_eq!((n.len(), n.driver.grows()), (1000, true));
    write(&n, 990, b"hello, world");
    assert_eq!(n.len(), 1002, "it grows");
    assert_eq!(&std::fs::read(&path).unwrap()[990..], b"hello, world");
    assert_eq!(read(&n, 995, 20), b", world\0\0\0\0\0\0\0\0\0\0\0\0\0");
    n.zero(2000, 96, Flags::NONE).unwrap();
    assert_eq!((n.len(), std::fs::metadata(&path).unwrap().len()), (2096, 2096));
    n.zero(990, 5, Flags::MAY_UNMAP).unwrap();
    assert_eq!(read(&n, 990, 12), b"\0\0\0\0\0, world");
    n.flush().unwrap();
    n.resize(500).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 500);
}

#[test]
fn lists_longer_than_the_kernel_takes() {
    let dir = Scratch::new("file-iov");
    let path = dir.file("a", 0);
    let mut graph = Graph::new();
    let n = node(&mut graph, &path);
    let data: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    let mut from = Iov::new();
    for piece in data.chunks(2) {
        // SAFETY: data outlives the list.
        unsafe { from.push_raw(piece.as_ptr().cast_mut(), piece.len()) };
    }
    assert!(from.iovecs().len() > 2 * 1024);
    n.write(7, &from, Flags::NONE).unwrap();
    assert_eq!(read(&n, 7, 5000), data);
    let mut back = vec![0u8; 5000];
    let mut to = IovMut::new();
    for piece in back.chunks_mut(3) {
        // SAFETY: back outlives the list and is not touched meanwhile.
        unsafe { to.push_raw(piece.as_mut_ptr(), piece.len()) };
    }
    n.read(7, &mut to).unwrap();
    assert_eq!(back, data);
}

#[test]
fn holes_are_made_and_found() {
    let dir = Scratch::new("file-holes");
    let path = dir.file("a", 1 << 20);
    let mut graph = Graph::new();
    let n = node(&mut graph, &path);
    write(&n, 256 << 10, &vec![1; 256 << 10]);
    n.flush().unwrap();
    let at = |off: u64| {
        let e = n.status(off, (1 << 20) - off).unwrap();
        (e.kind, e.len, e.host_offset)
    };
    assert_eq!(at(0), (ExtentKind::Zero, 256 << 10, Some(0)));
    assert_eq!(at(300 << 10), (ExtentKind::Data, 212 << 10, Some(300 << 10)));
    assert_eq!(at(512 << 10), (ExtentKind::Zero, 512 << 10, Some(512 << 10)));
    let before = n.driver.info().actual_size.unwrap();
    n.discard(256 << 10, 128 << 10).unwrap();
    assert!(n.driver.info().actual_size.unwrap() < before, "the space is given back");
    assert_eq!(at(0).1, 384 << 10);
    assert!(read(&n, 256 << 10, 4096).iter().all(|&b| b == 0));
    let stats = n.driver.stats().unwrap();
    assert_eq!((&stats["discard-nb-ok"], &stats["discard-bytes-ok"]), (&json!(1), &json!(131072)));
}

#[test]
fn without_the_page_cache_any_alignment_will_do() {
    let dir = Scratch::new("file-direct");
    // A length that is no multiple of any block.
    let path = dir.file("a", 100_001);
    let mut graph = Graph::new();
    let direct = Common { direct: Some(true), ..Common::default() };
    let n = match open_with(&mut graph, &path, direct) {
        Ok(n) => n,
        Err(e) => {
            assert!(e.desc.ends_with("filesystem does not support O_DIRECT"), "{e}");
            eprintln!("skipped: {e}");
            return;
        }
    };
    assert!(n.limits().request_alignment >= 512 && n.limits().memory_alignment >= 4);
    let mut model = vec![0u8; 100_001];
    let mut rng = Rng(7);
    for _ in 0..150 {
        let off = rng.below(100_001) as usize;
        let len = (rng.below(9000) as usize).min(100_001 - off);
        if rng.below(3) > 0 {
            let data: Vec<u8> = (0..len).map(|_| rng.draw() as u8).collect();
            write(&n, off as u64, &data);
            model[off..off + len].copy_from_slice(&data);
        } else {
            assert!(read(&n, off as u64, len) == model[off..off + len]);
        }
    }
    assert!(read(&n, 0, 100_001) == model);
}

#[test]
fn auto_read_only_writes_only_when_somebody_does() {
    let dir = Scratch::new("file-auto");
    let path = dir.file("a", 4096);
    let mut graph = Graph::new();
    let auto = Common { auto_read_only: Some(true), ..Common::default() };
    let n = open_with(&mut graph, &path, auto).unwrap();
    assert!(!n.read_only());
    assert_eq!(access_mode(&n), libc::O_RDONLY);
    let disk = graph.attach(Some(n.clone()), HandleSpec::default()).unwrap();
    assert_eq!(access_mode(&n), libc::O_RDWR);
    disk.write(0, &Iov::from_slice(b"abc"), Flags::NONE).unwrap();
    graph.detach(&disk);
    assert_eq!(access_mode(&n), libc::O_RDONLY);
    assert_eq!(read(&n, 0, 3), b"abc");
}

#[test]
fn auto_read_only_where_nobody_may_write() {
    let dir = Scratch::new("file-auto-ro");
    let path = dir.file("a", 4096);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    if std::fs::File::options().write(true).open(&path).is_ok() {
        eprintln!("skipped: root may write everywhere");
        return;
    }
    let mut graph = Graph::new();
    let e = open_with(&mut graph, &path, Common::default()).err().unwrap();
    assert_eq!(e.desc, format!("Could not open '{path}': Permission denied"));
    let auto = Common { auto_read_only: Some(true), ..Common::default() };
    assert!(open_with(&mut graph, &path, auto).unwrap().read_only());
}

#[test]
fn a_full_file_system_is_enospc_and_leaves_the_length_right() {
    // RLIMIT_FSIZE would do it with a signal; /dev/full is no regular file: drive the loop itself.
    let data = [1u8; 100];
    let iov = Iov::from_slice(&data);
    let mut calls = 0;
    let done = all_of(&iov, |vec, at| {
        calls += 1;
        assert_eq!(at + vec.iter().map(|v| v.iov_len as u64).sum::<u64>(), 100);
        [30, 50, 0][calls - 1]
    });
    assert_eq!((done.unwrap(), calls), (80, 3), "short writes go on until nothing is written");
}

#[test]
fn fds_do_not_leak() {
    let dir = Scratch::new("file-leak");
    let path = dir.file("a", 4096);
    let count = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        fds.filter(|e| std::fs::read_link(e.path()).is_ok_and(|p| p.to_str() == Some(&path))).count()
    };
    let mut graph = Graph::new();
    for _ in 0..50 {
        let node = open_with(&mut graph, &path, Common::default()).unwrap();
        let name = node.name.clone();
        assert_eq!(count(), 2, "one for data, one for locks");
        drop(node);
        graph.delete(&name).unwrap();
        let bad =
            Common { detect_zeroes: Some(crate::block::node::DetectZeroes::Unmap), ..Common::default() };
        assert!(open_with(&mut graph, &path, bad).is_err());
    }
    assert_eq!(count(), 0);
}

/// A loop device on a file, gone at the end; `None`, said so, where that needs more rights.
struct Loop(String);

impl Loop {
    fn new(path: &str) -> Option<Loop> {
        let made = std::process::Command::new("losetup").args(["--find", "--show", path]).output();
        match made {
            Ok(out) if out.status.success() => {
                Some(Loop(String::from_utf8(out.stdout).unwrap().trim().to_string()))
            }
            other => {
                eprintln!("skipped: no loop device (needs root and losetup): {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_of_the_host() {
    let dir = Scratch::new("file-loop");
    let path = dir.file("a", 4 << 20);
    let Some(device) = Loop::new(&path) else { return };
    for direct in [false, true] {
        let mut graph = Graph::new();
        let common = Common { direct: Some(direct), unmap: Some(true), ..Common::default() };
        let plan = Plan { common, driver: Box::new(FilePlan::new("host_device", &device.0)) };
        let n = open::open(&mut graph, &NoEnv, plan).unwrap();
        let disk = graph.attach(Some(n.clone()), HandleSpec::default()).unwrap();
        assert_eq!((n.len(), n.driver.grows()), (4 << 20, false));
        write(&n, 4096, &[7; 8192]);
        write(&n, 100_001, b"odd");
        assert_eq!(read(&n, 100_000, 5), b"\0odd\0");
        n.zero(4096, 4096, Flags::NONE).unwrap();
        n.zero(8193, 100, Flags::MAY_UNMAP).unwrap();
        assert_eq!(read(&n, 8192, 102), [&[7][..], &[0; 100], &[7]].concat());
        n.discard(0, 1 << 20).unwrap();
        assert!(read(&n, 0, 1 << 20).iter().all(|&b| b == 0), "a loop device reads zeroes then");
        n.flush().unwrap();
        let far = disk.write(4 << 20, &Iov::from_slice(&[0; 512]), Flags::NONE);
        assert_eq!(far.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(graph.resize(&n, 8 << 20).unwrap_err().desc, "Cannot grow device files");
        graph.resize(&n, 512).unwrap();
        assert_eq!(n.len(), 4 << 20, "a device keeps its length");
        assert_eq!(n.status(0, 4096).unwrap().kind, ExtentKind::Data);
        graph.detach(&disk);
    }
    let mut graph = Graph::new();
    let e = open_with(&mut graph, &device.0, Common::default()).err().unwrap();
    assert_eq!(e.desc, format!("'file' driver requires '{}' to be a regular file", device.0));
}

/// A small file system, gone at the end; `None`, said so, without the right to mount one.
struct Tmpfs(String);

impl Tmpfs {
    fn new(path: String) -> Option<Tmpfs> {
        Tmpfs::mount(path, &["-t", "tmpfs", "-o", "size=1m", "minivmm-test"])
    }

    /// An ext4 of `len` bytes: one that keeps what it found of too much.
    fn ext4(dir: &Scratch, len: u64) -> Option<Tmpfs> {
        let image = dir.file("ext4", len);
        match std::process::Command::new("mkfs.ext4").args(["-q", "-F", &image]).output() {
            Ok(out) if out.status.success() => Tmpfs::mount(dir.path("ext4-mnt"), &["-o", "loop", &image]),
            other => {
                eprintln!("skipped: no ext4 (e2fsprogs): {other:?}");
                None
            }
        }
    }

    fn mount(path: String, args: &[&str]) -> Option<Tmpfs> {
        std::fs::create_dir(&path).unwrap();
        let made = std::process::Command::new("mount").args(args).arg(&path).output();
        match made {
            Ok(out) if out.status.success() => Some(Tmpfs(path)),
            other => {
                eprintln!("skipped: no file system to fill (needs root): {other:?}");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn no_space_left_is_told_and_the_request_can_be_done_again() {
    use crate::event::ErrorAction;
    let dir = Scratch::new("file-full");
    let Some(fs) = Tmpfs::new(dir.path("mnt")) else { return };
    let path = format!("{}/a", fs.0);
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let mut graph = Graph::new();
    let n = node(&mut graph, &path);
    let disk = graph.attach(Some(n), HandleSpec::default()).unwrap();
    let data = vec![3; 2 << 20];
    let e = disk.write(0, &Iov::from_slice(&data), Flags::NONE).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(disk.on_error(false, &e), ErrorAction::Stop);
    assert_eq!(disk.len(), 4 << 20);
    let more = ["-o", "remount,size=8m", &fs.0];
    assert!(std::process::Command::new("mount").args(more).status().unwrap().success());
    disk.write(0, &Iov::from_slice(&data), Flags::NONE).unwrap();
    let mut back = vec![0; 2 << 20];
    disk.read(0, &mut IovMut::from_slice(&mut back)).unwrap();
    assert!(back == data);
    graph.detach(&disk);
    graph.close_all();
}

#[test]
fn new_space_is_allocated_in_advance_if_asked_for() {
    let dir = Scratch::new("file-prealloc");
    let path = dir.file("f", 0);
    let mut graph = Graph::new();
    let node = node(&mut graph, &path);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    node.resize_with(1 << 20, Preallocation::Off).unwrap();
    assert_eq!(blocks(), 0);
    node.resize_with(2 << 20, Preallocation::Falloc).unwrap();
    assert!(blocks() >= 1 << 20);
    node.resize_with(3 << 20, Preallocation::Full).unwrap();
    assert!(blocks() >= 2 << 20);
    assert_eq!((node.len(), std::fs::metadata(&path).unwrap().len()), (3 << 20, 3 << 20));
    let text = |how, len| node.resize_with(len, how).unwrap_err().to_string();
    assert_eq!(text(Preallocation::Metadata, 4 << 20), "Unsupported preallocation mode: metadata");
    assert_eq!(text(Preallocation::Full, 1 << 20), "Preallocation can't be used for shrinking files");
    assert_eq!(node.len(), 3 << 20);
}

#[test]
fn a_format_s_file_grows_by_space_that_is_ready() {
    let dir = Scratch::new("file-room");
    for direct in [false, true] {
        let path = dir.file(if direct { "direct" } else { "cached" }, 0);
        let mut graph = Graph::new();
        let common = Common { direct: Some(direct), ..Common::default() };
        let node = match open_with(&mut graph, &path, common) {
            Ok(node) => node,
            Err(e) if direct && e.to_string().contains("O_DIRECT") => return,
            Err(e) => panic!("{e}"),
        };
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
        node.grow(1 << 20).unwrap();
        assert_eq!((node.len(), std::fs::metadata(&path).unwrap().len()), (1 << 20, 1 << 20));
        assert!(blocks() >= 1 << 20, "{} bytes", blocks());
        let mut back = vec![1; 1 << 20];
        node.read(0, &mut IovMut::from_slice(&mut back)).unwrap();
        assert!(back.iter().all(|&b| b == 0));
        node.resize(4096).unwrap();
        assert!(blocks() <= 64 << 10);
    }
    let Some(fs) = Tmpfs::new(dir.path("mnt")) else { return };
    // More than there is: it is as long as it should be, and has what there was.
    let path = format!("{}/a", fs.0);
    std::fs::File::create(&path).unwrap();
    let mut graph = Graph::new();
    let Ok(node) = open_with(&mut graph, &path, Common { direct: Some(true), ..Common::default() }) else {
        return;
    };
    node.grow(1 << 30).unwrap();
    assert_eq!((node.len(), std::fs::metadata(&path).unwrap().len()), (1 << 30, 1 << 30));
    let block = crate::sys::buf::AlignedBuf::new(4096, 4096);
    node.write(0, &Iov::from_slice(&block), Flags::NONE).unwrap();
}

#[test]
fn a_format_s_file_takes_no_space_from_others_in_vain() {
    let dir = Scratch::new("file-greedy");
    let Some(fs) = Tmpfs::ext4(&dir, 24 << 20) else { return };
    let path = format!("{}/a", fs.0);
    std::fs::write(&path, vec![1; 4096]).unwrap();
    let mut graph = Graph::new();
    let node = node(&mut graph, &path);
    node.grow(64 << 20).unwrap();
    assert_eq!((node.len(), std::fs::metadata(&path).unwrap().len()), (64 << 20, 64 << 20));
    assert_eq!(read(&node, 0, 4096), [1; 4096]);
    assert_eq!(read(&node, 4096, 4096), [0; 4096]);
    // What could not be found as a whole is there for others.
    std::fs::write(format!("{}/b", fs.0), vec![2; 4 << 20]).unwrap();
    drop(node);
    graph.close_all();
}
