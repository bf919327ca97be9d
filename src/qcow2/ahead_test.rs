//! Pages of L2 tables that are read before anybody asks for them.

use super::create::{CreateOptions, create};
use super::open;
use crate::block::driver::{ExtentKind, Flags};
use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::testing::{At, Mem, MemState};
use crate::sys::iov::Iov;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

/// What a page of a table is about.
const PAGE: u64 = 32 << 20;

/// An image of 1 GiB, with data at its beginning and, for a second table, in its middle.
struct Image {
    state: Arc<MemState>,
    file: Arc<Node>,
    node: Arc<Node>,
}

impl Image {
    fn new() -> Image {
        let mem = Mem::new(0);
        let state = mem.state.clone();
        let file = Node::new("mem", Box::new(mem), NodeOptions::default());
        create(&file, None, &CreateOptions { size: 1 << 30, ..CreateOptions::default() }).unwrap();
        let mut image = Image { state, node: Image::open(&file, None), file };
        image.write(0);
        image.write(512 << 20);
        image.again(None);
        image
    }

    fn open(file: &Arc<Node>, cache: Option<u64>) -> Arc<Node> {
        let edge = Edge::new("file", Some(file.clone()));
        let options = open::Options { l2_cache_size: cache, ..open::Options::default() };
        let driver = open::open(edge, Edge::new("backing", None), None, options).unwrap();
        Node::new("image", Box::new(driver), NodeOptions::default())
    }

    /// Closes and opens it.
    fn again(&mut self, cache: Option<u64>) {
        *self.state.hook.lock().unwrap() = None;
        self.node.driver.close().unwrap();
        self.node = Image::open(&self.file, cache);
    }

    fn write(&self, off: u64) {
        self.node.write(off, &Iov::from_slice(&[7; 4096]), Flags::NONE).unwrap();
    }

    fn has_data(&self, off: u64) -> bool {
        self.node.status(off, 1).unwrap().kind == ExtentKind::Data
    }

    /// Does `f` once, as soon as more than a page was read, and before the reader hears of it.
    fn on_ahead(&self, f: impl Fn(&Node) + Send + Sync + 'static) {
        let (state, node) = (Arc::downgrade(&self.state), self.node.clone());
        let hook = move |at, _, len| {
            if at == At::HasRead && len > 4096 {
                *state.upgrade().unwrap().hook.lock().unwrap() = None;
                f(&node);
            }
        };
        *self.state.hook.lock().unwrap() = Some(Arc::new(hook));
    }
}

#[test]
fn who_walks_reads_the_rest_and_others_a_page() {
    let mut image = Image::new();
    let reads: Arc<Mutex<Vec<u64>>> = Arc::default();
    let watch = |image: &Image| {
        let reads = reads.clone();
        let hook = move |at, _, len| {
            if at == At::Read {
                reads.lock().unwrap().push(len);
            }
        };
        *image.state.hook.lock().unwrap() = Some(Arc::new(hook));
    };
    watch(&image);
    let mut at = 0;
    while at < 1 << 30 {
        at += image.node.status(at, (1 << 30) - at).unwrap().len;
    }
    assert_eq!(std::mem::take(&mut *reads.lock().unwrap()), [4096, 15 << 12, 4096, 15 << 12]);
    image.again(None);
    watch(&image);
    for page in [7, 3, 1, 9] {
        assert!(!image.has_data(page * PAGE));
    }
    assert_eq!(std::mem::take(&mut *reads.lock().unwrap()), [4096; 4]);
    // Up to the next that is there.
    assert!(!image.has_data(4 * PAGE) && !image.has_data(6 * PAGE));
    assert_eq!(std::mem::take(&mut *reads.lock().unwrap()), [3 << 12]);
    // A small cache is not filled with it.
    image.again(Some(16 << 12));
    watch(&image);
    assert!(image.has_data(0) && !image.has_data(PAGE));
    assert_eq!(std::mem::take(&mut *reads.lock().unwrap()), [4096, 8 << 12]);
}

#[test]
fn what_changes_meanwhile_stays_changed() {
    let mut image = Image::new();
    assert!(image.has_data(0));
    image.on_ahead(|node| {
        node.write(5 * PAGE, &Iov::from_slice(&[7; 4096]), Flags::NONE).unwrap();
    });
    assert!(!image.has_data(PAGE) && image.state.hook.lock().unwrap().is_none());
    assert!(image.has_data(5 * PAGE));
    image.again(None);
    assert!(image.has_data(5 * PAGE));
}

#[test]
fn what_was_written_meanwhile_and_let_go_is_read_again() {
    let mut image = Image::new();
    image.again(Some(8 << 12));
    assert!(image.has_data(0));
    image.on_ahead(|node| {
        node.write(2 * PAGE, &Iov::from_slice(&[7; 4096]), Flags::NONE).unwrap();
        node.flush().unwrap();
        // More pages than there is room for.
        for page in (5..32).rev() {
            node.status(page * PAGE, 1).unwrap();
        }
    });
    assert!(!image.has_data(PAGE) && image.state.hook.lock().unwrap().is_none());
    assert!(image.has_data(2 * PAGE));
}

#[test]
fn what_cannot_be_read_fails_who_asks_for_it() {
    let image = Image::new();
    let state = image.state.clone();
    let long = move |at, _, len| {
        if at == At::Read {
            state.fail.store(if len > 4096 { libc::EIO } else { 0 }, SeqCst);
        }
    };
    assert!(image.has_data(0));
    *image.state.hook.lock().unwrap() = Some(Arc::new(long));
    assert!(!image.has_data(PAGE) && !image.has_data(2 * PAGE));
    *image.state.hook.lock().unwrap() = None;
}
