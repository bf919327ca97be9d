use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::testing::Mem;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::crypt::{CreateEncrypt, Unlock};
use crate::qcow2::header::Crypt;
use crate::qcow2::open::{Options, open};
use crate::sys::iov::Iov;
use std::sync::Arc;

const HOW: &str = "Encrypted images need a minivmm with ciphers: build it with cargo build --features luks";

#[test]
fn an_encrypted_image_is_refused_with_the_way_to_open_it() {
    let file: Arc<Node> = Node::new("file", Box::new(Mem::new(0)), NodeOptions::default());
    create(&file, None, &CreateOptions { size: 1 << 20, ..CreateOptions::default() }).unwrap();
    // The method in the header: the legacy one.
    file.write(35, &Iov::from_slice(&[1]), crate::block::driver::Flags::NONE).unwrap();
    for password in [None, Some(b"x".to_vec())] {
        let encrypt = password.map(|p| Unlock { method: Crypt::Aes, password: Some(p), secret: None });
        let options = Options { encrypt, ..Options::default() };
        let opened = open(Edge::new("file", Some(file.clone())), Edge::new("backing", None), None, options);
        assert_eq!(opened.err().unwrap().to_string(), HOW);
    }
}

#[test]
fn none_is_made_either() {
    for method in [Crypt::Aes, Crypt::Luks] {
        let file: Arc<Node> = Node::new("file", Box::new(Mem::new(0)), NodeOptions::default());
        let encrypt = Some(CreateEncrypt::new(method, b"x".to_vec()));
        let made = create(&file, None, &CreateOptions { size: 1 << 20, encrypt, ..CreateOptions::default() });
        assert_eq!((made.err().unwrap().to_string(), file.len()), (HOW.to_string(), 0));
    }
}
