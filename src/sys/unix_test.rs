use super::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};

fn files(n: usize) -> Vec<File> {
    (0..n).map(|_| File::open("/dev/null").unwrap()).collect()
}

fn send_with(to: &UnixStream, data: &[u8], files: &[File]) {
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    assert_eq!(send_fds(to.as_fd(), data, &fds).unwrap(), data.len());
}

/// Each read: its bytes, and with which byte how many descriptors came.
fn all(from: &UnixStream) -> Vec<(String, Option<(usize, usize)>)> {
    let mut buf = [0; 64];
    let mut out = Vec::new();
    loop {
        match recv(from.as_fd(), &mut buf) {
            Ok(r) => {
                let text = String::from_utf8_lossy(&buf[..r.len]).into_owned();
                out.push((text, r.fds.map(|(at, fds)| (at, fds.len()))));
            }
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                return out;
            }
        }
    }
}

#[test]
fn it_is_known_with_which_byte_descriptors_came() {
    let (a, b) = UnixStream::pair().unwrap();
    let mut plain = &a;
    plain.write_all(b"one").unwrap();
    plain.write_all(b"two").unwrap();
    assert_eq!(all(&b), [("onetwo".to_string(), None)]);
    send_with(&a, b"three", &files(1));
    assert_eq!(all(&b), [("three".to_string(), Some((0, 1)))]);

    plain.write_all(b"one").unwrap();
    plain.write_all(b"two").unwrap();
    send_with(&a, b"three", &files(2));
    plain.write_all(b"four").unwrap();
    send_with(&a, b"5", &files(1));
    send_with(&a, b"six", &files(3));
    plain.write_all(b"seven").unwrap();
    let (mut text, mut places) = (String::new(), Vec::new());
    for (s, fds) in all(&b) {
        places.extend(fds.map(|(at, n)| (text.len() + at, n)));
        text += &s;
    }
    assert_eq!(text, "onetwothreefour5sixseven");
    assert_eq!(places, [(6, 2), (15, 1), (16, 3)]);
}

#[test]
fn a_long_message_has_its_descriptors_at_its_first_byte_only() {
    let (a, b) = UnixStream::pair().unwrap();
    send_with(&a, &[b'x'; 150], &files(1));
    let got: Vec<_> = all(&b).iter().map(|(s, n)| (s.len(), *n)).collect();
    assert_eq!(got, [(64, Some((0, 1))), (64, None), (22, None)]);
}

#[test]
fn what_arrives_is_the_same_file_and_is_closed_on_exec() {
    let (a, b) = UnixStream::pair().unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    let inode = file.metadata().unwrap().ino();
    send_with(&a, b"x", &[file]);
    let (_, mut fds) = recv(b.as_fd(), &mut [0; 8]).unwrap().fds.unwrap();
    let fd = fds.pop().unwrap();
    // SAFETY: F_GETFD touches no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    assert_eq!(File::from(fd).metadata().unwrap().ino(), inode);
}

#[test]
fn sixteen_are_taken_and_the_others_closed() {
    let (a, b) = UnixStream::pair().unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let dup = || writer.try_clone().unwrap().into();
    let many: Vec<OwnedFd> = (0..20).map(|_| dup()).collect();
    // More than MAX_FDS in one message: by hand.
    let mut control = [0u64; 32];
    let mut iov = libc::iovec { iov_base: b"x".as_ptr().cast_mut().cast(), iov_len: 1 };
    // SAFETY: as in send_fds; the buffer has room for 20 descriptors.
    unsafe {
        let mut msg: libc::msghdr = mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = libc::CMSG_SPACE(80) as usize;
        let header = libc::CMSG_FIRSTHDR(&msg);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(80) as usize;
        let to = libc::CMSG_DATA(header).cast::<RawFd>();
        many.iter().enumerate().for_each(|(i, fd)| to.add(i).write_unaligned(fd.as_raw_fd()));
        assert_eq!(libc::sendmsg(a.as_raw_fd(), &msg, 0), 1);
    }
    drop((many, writer));
    let r = recv(b.as_fd(), &mut [0; 8]).unwrap();
    let (at, fds) = r.fds.unwrap();
    assert_eq!((r.len, at, fds.len()), (1, 0, MAX_FDS));
    drop(fds);
    // No writer is left anywhere: the pipe is at its end.
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn the_end_of_the_stream_and_a_peer_that_is_gone() {
    let (a, b) = UnixStream::pair().unwrap();
    assert_eq!(recv(b.as_fd(), &mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(a);
    assert_eq!(recv(b.as_fd(), &mut [0; 8]).unwrap().len, 0);
    assert_eq!(send(b.as_fd(), b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn kinds() {
    let (a, _b) = UnixStream::pair().unwrap();
    assert_eq!(kind(a.as_fd()), Kind::Unix);
    assert_eq!(kind(File::open("/dev/null").unwrap().as_fd()), Kind::Other);
    let path = std::env::temp_dir().join(format!("minivmm-kind-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(kind(listener.as_fd()), Kind::Listener);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(kind(tcp.as_fd()), Kind::Listener);
    let tcp = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    assert_eq!(kind(tcp.as_fd()), Kind::Socket);
}
