use super::*;
use crate::block::node::NodeOptions;
use crate::block::testing::Mem;
use crate::sys::inbox::Inbox;
use std::sync::atomic::AtomicU64;

fn code<T: std::fmt::Debug>(r: io::Result<T>) -> i32 {
    r.unwrap_err().raw_os_error().unwrap()
}

fn disk(spec: HandleSpec) -> (Arc<Handle>, Arc<crate::block::testing::MemState>) {
    let mem = Mem::new(4096);
    let state = mem.state.clone();
    (Handle::new(Some(Node::new("n", Box::new(mem), NodeOptions::default())), spec), state)
}

#[test]
fn the_end_of_the_disk_is_the_end_for_a_guest() {
    let (h, _) = disk(HandleSpec::default());
    assert_eq!(h.len(), 4096);
    assert_eq!(code(h.read(4000, &mut IovMut::from_slice(&mut [0; 97]))), libc::EIO);
    assert_eq!(code(h.write(u64::MAX, &Iov::from_slice(&[0; 97]), Flags::NONE)), libc::EIO);
    assert_eq!(code(h.zero(4096, 1, Flags::NONE)), libc::EIO);
    assert_eq!(code(h.discard(0, 4097)), libc::EIO);
    h.read(4000, &mut IovMut::from_slice(&mut [0; 96])).unwrap();
    let (r, w) = (h.stats.get(Kind::Read), h.stats.get(Kind::Write));
    assert_eq!((r.operations, r.bytes, r.failed), (1, 96, 1));
    assert_eq!((w.operations, w.failed), (0, 2));
}

#[test]
fn without_a_medium_or_without_the_right_to_write() {
    let h = Handle::new(None, HandleSpec::default());
    assert_eq!(code(h.read(0, &mut IovMut::from_slice(&mut [0; 1]))), libc::ENOMEDIUM);
    assert_eq!(h.len(), 0);
    let (h, _) = disk(HandleSpec { uses: Perm::CONSISTENT_READ, ..HandleSpec::default() });
    assert_eq!(code(h.write(0, &Iov::from_slice(&[1]), Flags::NONE)), libc::EPERM);
    assert!(h.read_only());
}

#[test]
fn writethrough_flushes_after_each_write() {
    let (h, state) = disk(HandleSpec { write_cache: false, ..HandleSpec::default() });
    h.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap();
    assert_eq!(state.flushes.load(Ordering::SeqCst), 1);
    h.set_write_cache(true);
    h.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap();
    assert_eq!(state.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(h.stats.get(Kind::Flush).operations, 0, "the guest did not ask for it");
}

#[test]
fn the_error_policy_in_full() {
    use ErrorAction::*;
    let (io, space) = (errno(libc::EIO), errno(libc::ENOSPC));
    for (policy, read_io, read_space, write_io, write_space) in [
        (OnError::Auto, Report, Report, Report, Stop),
        (OnError::Report, Report, Report, Report, Report),
        (OnError::Ignore, Ignore, Ignore, Ignore, Ignore),
        (OnError::Stop, Stop, Stop, Stop, Stop),
        (OnError::Enospc, Report, Stop, Report, Stop),
    ] {
        let (h, _) = disk(HandleSpec { rerror: policy, werror: policy, ..HandleSpec::default() });
        assert_eq!(h.on_error(true, &io), read_io, "{policy:?}");
        assert_eq!(h.on_error(true, &space), read_space, "{policy:?}");
        assert_eq!(h.on_error(false, &io), write_io, "{policy:?}");
        assert_eq!(h.on_error(false, &space), write_space, "{policy:?}");
    }
}

#[test]
fn an_error_is_told_and_the_status_lasts_until_cont() {
    let (h, _) = disk(HandleSpec { name: "drive0".into(), ..HandleSpec::default() });
    let events: Events = Arc::new(Inbox::new().unwrap());
    h.set_owner("vd0", "/machine/peripheral/vd0", Some(events.clone()));
    assert_eq!(h.on_error(false, &errno(libc::EIO)), ErrorAction::Report);
    assert_eq!(h.io_status(), IoStatus::Ok, "only a stop sets it");
    assert_eq!(h.on_error(false, &errno(libc::ENOSPC)), ErrorAction::Stop);
    h.set_policy(OnError::Stop, OnError::Stop);
    assert_eq!(h.on_error(true, &errno(libc::EIO)), ErrorAction::Stop);
    assert_eq!(h.io_status(), IoStatus::NoSpace, "the first one stays");
    h.reset_io_status();
    assert_eq!(h.io_status(), IoStatus::Ok);
    let told: Vec<_> = events.take().into();
    assert_eq!(told.len(), 3);
    assert_eq!(
        told[1],
        Event::BlockIoError(BlockIoError {
            qom_path: "/machine/peripheral/vd0".into(),
            device: "drive0".into(),
            node_name: Some("n".into()),
            read: false,
            action: ErrorAction::Stop,
            nospace: true,
            reason: "No space left on device".into(),
        })
    );
}

#[test]
fn a_resize_is_told_with_the_new_length() {
    let (h, _) = disk(HandleSpec::default());
    let seen = Arc::new(AtomicU64::new(0));
    let s = seen.clone();
    h.on_resize(Some(Box::new(move |len| s.store(len, Ordering::SeqCst))));
    h.node().unwrap().resize(8192).unwrap();
    h.resized();
    assert_eq!(seen.load(Ordering::SeqCst), 8192);
}
