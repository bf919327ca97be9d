//! A file system with little space, for a test alone.

use super::kit::Dir;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Runs `f` with a directory that has so many MiB in all; says so and skips without the right to.
pub fn on_a_small_disk(mib: u32, f: impl FnOnce(PathBuf) + Send + 'static) {
    let dir = Dir::new();
    let small = dir.join("");
    std::thread::spawn(move || {
        let at = CString::new(small.to_str().unwrap()).unwrap();
        let size = CString::new(format!("size={mib}m")).unwrap();
        let (private, flags) = (libc::MS_REC | libc::MS_PRIVATE, libc::MS_NOSUID);
        // SAFETY: system calls with C strings that live here; they change this thread's mounts, and
        // those of the processes that it starts.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(c"".as_ptr(), c"/".as_ptr(), c"".as_ptr(), private, std::ptr::null()) == 0
                && libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), flags, size.as_ptr().cast())
                    == 0
        };
        if !mounted {
            eprintln!("skipped: it mounts a file system, which needs root (run it with sudo)");
            return;
        }
        f(small);
    })
    .join()
    .unwrap();
}

/// Leaves no more than `free` bytes: what lies in the file that it makes.
pub fn fill(small: &Path, free: u64) -> PathBuf {
    let (path, spare) = (small.join("filling"), small.join("spare"));
    std::fs::write(&spare, vec![1; free as usize]).unwrap();
    let mut file = std::fs::File::create(&path).unwrap();
    while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
    std::fs::remove_file(spare).unwrap();
    path
}
