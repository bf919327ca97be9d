use super::*;
use crate::block::node::{Edge, NodeOptions};
use crate::block::testing::{Mem, MemState};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::header::Header;
use crate::qcow2::open::{Options, open};
use std::sync::Arc;

fn image(options: &CreateOptions) -> (Qcow2, Arc<MemState>) {
    let mut mem = Mem::new(0);
    mem.grows = true;
    let state = mem.state.clone();
    let node = Node::new("file", Box::new(mem), NodeOptions::default());
    create(&node, None, options).unwrap();
    let (file, backing) = (Edge::new("file", Some(node)), Edge::new("backing", None));
    (open(file, backing, None, Options::default()).unwrap(), state)
}

/// The header with the extension counting.
fn on_disk(state: &MemState) -> Header {
    let mut bytes = state.data.lock().unwrap().clone();
    bytes[95] |= 1;
    Header { autoclear: 0, ..Header::parse(&bytes).unwrap() }
}

#[test]
fn it_finds_a_place_is_found_again_and_goes() {
    for cluster_size in [512, 1024, 4096, 65536] {
        for name in [
            None,
            Some("b"),
            Some("/a/base.qcow2"),
            Some("0123456789abcdef0123456789abcdef0123456789abcdef0123456789"),
        ] {
            let (image, state) = image(&CreateOptions {
                size: 1 << 20,
                cluster_size,
                backing_file: name.map(str::to_string),
                backing_format: name.map(|_| "raw".to_string()),
                ..CreateOptions::default()
            });
            let before = on_disk(&state);
            let say = format!("{cluster_size} {name:?}");
            let fits = image.extension_fits().is_ok();
            for n in 1..5 {
                let ext = BitmapsExt { count: n, size: 48 * u64::from(n), offset: cluster_size * 7 };
                let done = image.write_extension(Some(ext));
                assert_eq!(done.is_ok(), fits, "{say}");
                let want = if fits { Some(ext) } else { None };
                assert_eq!(on_disk(&state), Header { bitmaps: want, ..before.clone() }, "{say}");
                assert_eq!(image.lock().sector[..], state.data.lock().unwrap()[..512], "{say}");
                if n == 2 {
                    image.write_extension(None).unwrap();
                    assert_eq!(on_disk(&state), before, "{say}");
                }
            }
            assert!(fits, "{say}");
        }
    }
}

/// In a header of one sector the names of features make room.
#[test]
fn one_sector_is_written_anew() {
    let (image, state) =
        image(&CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let mut header = on_disk(&state);
    header.feature_names = Some(crate::qcow2::header::feature_name_table());
    let full = header.to_bytes().unwrap();
    assert_eq!(full.len(), 512);
    state.data.lock().unwrap()[..512].copy_from_slice(&full);
    image.extension_fits().unwrap();
    let ext = BitmapsExt { count: 1, size: 48, offset: 512 * 9 };
    image.write_extension(Some(ext)).unwrap();
    assert_eq!(on_disk(&state), Header { bitmaps: Some(ext), feature_names: None, ..header });
}

/// A disk that keeps every state between two writes of at most a sector.
#[test]
fn the_header_is_good_at_every_moment() {
    for name in [None, Some("/some/where/base.qcow2".to_string()), Some("x".repeat(600))] {
        let (image, state) = image(&CreateOptions {
            size: 1 << 20,
            backing_file: name.clone(),
            backing_format: name.as_ref().map(|_| "raw".into()),
            ..CreateOptions::default()
        });
        let before = state.data.lock().unwrap().clone();
        let header = Header::parse(&before).unwrap();
        let ext = BitmapsExt { count: 1, size: 48, offset: 7 << 16 };
        image.write_extension(Some(ext)).unwrap();
        let after = state.data.lock().unwrap().clone();
        assert_ne!(before[..1024], after[..1024]);
        // The writes come in this order, each on stable storage before the next; none but the second
        // last crosses a sector. Any prefix of them, with any part of the one that is cut off, reads
        // as the header of before.
        let places = Places::find(&before);
        let (at, moved) = places.room(65536).unwrap();
        let mut steps: Vec<(usize, usize)> = Vec::new();
        if let (Some(to), Some((_, len))) = (moved, places.name) {
            steps.push((to, len));
            steps.push((8, 8));
        }
        steps.push((at + 8, LENGTH));
        let mut now = before.clone();
        for (from, len) in steps {
            for byte in from..from + len {
                if len > 8 {
                    now[byte] = after[byte];
                    assert_eq!(Header::parse(&now).unwrap(), header, "byte {byte}");
                }
            }
            now[from..from + len].copy_from_slice(&after[from..from + len]);
            assert_eq!(Header::parse(&now).unwrap(), header, "{from}");
        }
        now[at..at + 8].copy_from_slice(&after[at..at + 8]);
        assert_eq!(now, after);
    }
}
