use super::*;
use std::fs::{File, OpenOptions};

fn open(write: bool) -> OwnedFd {
    OpenOptions::new().read(true).write(write).open("/dev/null").unwrap().into()
}

fn shape(sets: &mut FdSets) -> Vec<(i64, usize)> {
    sets.list().iter().map(|s| (s.id, s.fds.len())).collect()
}

#[test]
fn new_sets_take_the_lowest_free_number_and_are_listed_from_the_highest_down() {
    let mut sets = FdSets::new();
    assert_eq!(sets.add(open(false), None, None).unwrap().0, 0);
    assert_eq!(sets.add(open(false), None, None).unwrap().0, 1);
    let (_, fd) = sets.add(open(false), Some(1), Some("x".into())).unwrap();
    sets.add(open(false), Some(5), Some(String::new())).unwrap();
    assert_eq!(sets.add(open(false), None, None).unwrap().0, 2);
    assert_eq!(shape(&mut sets), [(5, 1), (2, 1), (1, 2), (0, 1)]);
    sets.remove(1, Some(i64::from(fd))).unwrap();
    let e = sets.remove(1, Some(i64::from(fd))).unwrap_err();
    assert_eq!(e.desc, format!("File descriptor named 'fdset-id:1, fd:{fd}' not found"));
    sets.remove(1, None).unwrap();
    let e = sets.remove(1, None).unwrap_err();
    assert_eq!(e.desc, "File descriptor named 'fdset-id:1' not found");
    assert_eq!(sets.add(open(false), None, None).unwrap().0, 1);
    let e = sets.add(open(false), Some(-1), None).unwrap_err();
    assert_eq!(e.desc, "Parameter 'fdset-id' expects a non-negative value");
}

#[test]
fn a_duplicate_has_the_access_mode_asked_for_and_keeps_its_set() {
    let mut sets = FdSets::new();
    let e = sets.dup("/dev/fdset/7", libc::O_RDWR).unwrap_err();
    assert_eq!(e.desc, "Failed to find fdset /dev/fdset/7");
    sets.add(open(false), Some(7), None).unwrap();
    let e = sets.dup("/dev/fdset/7", libc::O_RDWR).unwrap_err();
    assert_eq!(e.desc, "Failed to find file descriptor with matching flags=0x2");
    let (_ro, ro_use) = sets.dup("/dev/fdset/7", libc::O_RDONLY).unwrap();
    sets.add(open(true), Some(7), None).unwrap();
    let (rw, rw_use) = sets.dup("/dev/fdset/7", libc::O_RDWR).unwrap();
    assert_eq!(status_flags(&rw).unwrap() & libc::O_ACCMODE, libc::O_RDWR);
    assert!(sets.dup("/dev/fdset/7", libc::O_RDWR | libc::O_DIRECT).is_err());
    sets.remove(7, None).unwrap();
    assert_eq!(shape(&mut sets), [(7, 0)]);
    drop(ro_use);
    assert_eq!(shape(&mut sets), [(7, 0)]);
    std::thread::spawn(move || drop(rw_use)).join().unwrap();
    assert_eq!(shape(&mut sets), []);
}

#[test]
fn the_newest_match_wins() {
    let mut sets = FdSets::new();
    let file = File::open("/proc/self/status").unwrap();
    sets.add(open(false), Some(0), None).unwrap();
    sets.add(file.into(), Some(0), None).unwrap();
    let (fd, _use) = sets.dup("/dev/fdset/0", libc::O_RDONLY).unwrap();
    let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert!(target.ends_with("status"), "{target:?}");
}

#[test]
fn only_plain_numbers_name_a_set() {
    assert_eq!(parse("/dev/fdset/0"), Some(0));
    assert_eq!(parse("/dev/fdset/12"), Some(12));
    for no in [
        "/dev/fdset/",
        "/dev/fdset/-1",
        "/dev/fdset/1x",
        "/dev/fdset/+1",
        "/dev/fdset",
        "fdset/1",
        "/dev/fdset/99999999999999999999",
    ] {
        assert_eq!(parse(no), None, "{no}");
    }
}
