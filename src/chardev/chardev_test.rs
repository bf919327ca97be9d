use super::super::testing::{is_nonblocking, output, pair, pipe};
use super::*;
use crate::sys::fdio::Output;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};

struct Calls {
    input: Mutex<Sender<&'static str>>,
}

impl Frontend for Calls {
    fn input_ready(&self) {
        self.input.lock().unwrap().send("input").unwrap();
    }

    fn output_room(&self) {
        self.input.lock().unwrap().send("room").unwrap();
    }
}

fn attach(chardev: &Chardev) -> (Arc<dyn Frontend>, Receiver<&'static str>) {
    let (tx, rx) = channel();
    let frontend: Arc<dyn Frontend> = Arc::new(Calls { input: Mutex::new(tx) });
    chardev.attach(Arc::downgrade(&frontend));
    (frontend, rx)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn output_arrives_promptly_and_in_order() {
    let (chardev, mut host) = pair();
    let mut all: Vec<u8> = Vec::new();
    for n in 0..200u32 {
        let text = format!("line {n}\n");
        assert_eq!(chardev.write(text.as_bytes()), text.len());
        all.extend(text.as_bytes());
    }
    let mut got = vec![0; all.len()];
    host.read_exact(&mut got).unwrap();
    assert_eq!(got, all);
    assert!(chardev.drain(SOON));
}

#[test]
fn a_slow_reader_pushes_back_and_loses_nothing() {
    let (chardev, mut host) = pair();
    let (_frontend, calls) = attach(&chardev);
    let pattern: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut sent = 0;
    let mut refusals = 0;
    let reader = std::thread::spawn({
        let len = pattern.len();
        move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut got = vec![0; len];
            host.read_exact(&mut got).unwrap();
            got
        }
    });
    while sent < pattern.len() {
        let n = chardev.write(&pattern[sent..(sent + 10_000).min(pattern.len())]);
        sent += n;
        if n < 10_000 && sent < pattern.len() {
            refusals += 1;
            assert_eq!(calls.recv_timeout(SOON), Ok("room"));
        }
    }
    assert!(refusals > 0);
    assert!(reader.join().unwrap() == pattern);
}

#[test]
fn a_reader_that_never_reads_stops_neither_writer_nor_close() {
    let (chardev, host) = pair();
    let start = Instant::now();
    let mut taken = 0;
    for _ in 0..200 {
        taken += chardev.write(&[0; 4096]);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(taken < 200 * 4096, "bounded: {taken}");
    assert!(start.elapsed() < Duration::from_secs(4));
    assert!(!chardev.drain(Duration::from_millis(10)));
    chardev.close();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(chardev.write(b"gone"), 4, "afterwards output vanishes");
    drop(host);
}

#[test]
fn close_writes_everything_first() {
    let (chardev, mut host) = pair();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let mut got: Vec<u8> = Vec::new();
        host.read_to_end(&mut got).unwrap();
        got.len()
    });
    let mut taken = 0;
    while taken < 300_000 {
        taken += chardev.write(&[7; 5000]);
    }
    chardev.close();
    drop(chardev);
    assert_eq!(reader.join().unwrap(), taken);
}

#[test]
fn a_reader_that_goes_away_frees_who_waits() {
    let (chardev, host) = pair();
    let (_frontend, calls) = attach(&chardev);
    while chardev.write(&[0; 4096]) == 4096 {}
    // Room comes until both buffers are full; after that only the end of the reader helps.
    while calls.recv_timeout(Duration::from_millis(200)).is_ok() {
        while chardev.write(&[0; 4096]) == 4096 {}
    }
    drop(host);
    assert_eq!(calls.recv_timeout(SOON), Ok("room"));
    assert!(chardev.drain(SOON));
}

#[test]
fn input_waits_in_the_pipe_when_no_one_takes_it() {
    let (chardev, mut host) = pair();
    let (_frontend, calls) = attach(&chardev);
    let pattern: Vec<u8> = (0..100_000u32).map(|n| (n % 253) as u8).collect();
    let writer = std::thread::spawn({
        let pattern = pattern.clone();
        move || {
            host.write_all(&pattern).unwrap();
            host
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(chardev.shared.lock().input.len() < 2 * INPUT);
    let mut got: Vec<u8> = Vec::new();
    let mut buf = [0; 13];
    while got.len() < pattern.len() {
        match chardev.take(&mut buf) {
            0 => assert_eq!(calls.recv_timeout(SOON), Ok("input")),
            n => got.extend(&buf[..n]),
        }
    }
    assert!(got == pattern);
    // The end of the input is not the end of the output.
    let mut host = writer.join().unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(chardev.write(b"still here"), 10);
    let mut buf = [0; 10];
    host.read_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"still here");
}

#[test]
fn a_null_chardev_needs_no_thread() {
    let chardev = Chardev::null("n").unwrap();
    let (_frontend, _calls) = attach(&chardev);
    assert_eq!(chardev.write(&[0; 1 << 20]), 1 << 20);
    assert_eq!(chardev.take(&mut [0]), 0);
    assert!(chardev.thread.lock().unwrap().is_none());
}

#[test]
fn a_file_starts_no_thread_before_its_first_byte_and_gets_all() {
    let dir = std::env::temp_dir().join(format!("minivmm-chardev-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("out");
    std::fs::write(&path, "old").unwrap();
    let chardev = super::super::file::open("f", &path, true).unwrap();
    let (_frontend, _calls) = attach(&chardev);
    assert!(chardev.thread.lock().unwrap().is_none());
    chardev.write(b" new");
    drop(chardev);
    assert_eq!(std::fs::read(&path).unwrap(), b"old new");
    drop(super::super::file::open("f", &path, false).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), b"");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_full_pipe_would_block_though_its_mode_is_left_alone() {
    let (reader, writer) = pipe();
    let shell = writer.try_clone().unwrap();
    let mut output = Output::new(writer).unwrap();
    let mut total = 0;
    let error = loop {
        match output.write(&[1; 3000]) {
            Ok(n) => total += n,
            Err(e) => break e,
        }
        assert!(total < 10 << 20, "a pipe without end");
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(!is_nonblocking(&shell));
    drop(reader);
    assert_eq!(output.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn a_full_socket_would_block_too() {
    let (_reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut output = Output::new(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
    let error = (0..10_000).find_map(|_| output.write(&[1; 3000]).err()).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_pipe_that_is_read_needs_no_thread_and_a_full_one_loses_nothing() {
    let (mut reader, writer) = pipe();
    let chardev = output(writer);
    let (_frontend, calls) = attach(&chardev);
    let mut buf = [0; 5];
    for _ in 0..1000 {
        assert_eq!(chardev.write(b"hello"), 5);
        reader.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"hello");
    }
    assert!(chardev.thread.lock().unwrap().is_none());
    // Faster than it is read: at once, through the queue and at once again, in order all the same.
    let pattern: Vec<u8> = (0..2_000_000u32).map(|n| (n % 249) as u8).collect();
    let thread = std::thread::spawn({
        let len = pattern.len();
        move || {
            let mut got = vec![0; len];
            for (n, piece) in got.chunks_mut(100_000).enumerate() {
                std::thread::sleep(Duration::from_millis(if n % 4 == 0 { 20 } else { 0 }));
                reader.read_exact(piece).unwrap();
            }
            got
        }
    });
    let mut sent = 0;
    while sent < pattern.len() {
        let end = (sent + 777).min(pattern.len());
        let n = chardev.write(&pattern[sent..end]);
        sent += n;
        if sent < end {
            assert_eq!(calls.recv_timeout(SOON), Ok("room"));
        }
    }
    assert!(thread.join().unwrap() == pattern);
    assert_eq!(chardev.write(b"nobody reads"), 12);
    chardev.close();
    assert_eq!(chardev.write(b"closed"), 6);
}

#[test]
fn that_output_is_lost_is_said_once() {
    let full = io::Error::from_raw_os_error(libc::ENOSPC);
    let mut told = false;
    assert!(lost("test", &full, &mut told).is_some() && told);
    assert!(lost("test", &io::ErrorKind::WouldBlock.into(), &mut told).is_none());
}
