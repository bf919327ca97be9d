//! Random bytes from the kernel.
//!
//! Threads: any. Locks: none.

use std::io;

/// Fills `to` from getrandom(2). Blocks only in the first seconds after the host has booted.
pub fn fill(to: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < to.len() {
        let rest = &mut to[done..];
        // SAFETY: the pointer and length are those of a live slice.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(())
}
