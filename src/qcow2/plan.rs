//! `blockdev-add`'s options of driver `qcow2`, able to open it.
//!
//! Owns: in which order an image, its backing file and its data file are opened. Never: decides
//! what an image may name ([`Opening`] does). Threads: the control thread. Locks: none.

use super::corrupt::{Corruption, OnCorrupt};
use super::crypt::{self, Unlock};
use super::header::Crypt;
use super::open::{self, Options};
use crate::block::driver::{Driver, Perm};
use crate::block::open::{Backing, Child, Open, Opening};
use crate::block::perm;
use crate::error::{Error, Result, strerror};
use crate::event::Event;

/// The driver `qcow2`, with its options.
pub struct Qcow2Plan {
    /// What has the image's bytes.
    pub file: Child,
    /// Where the backing file comes from.
    pub backing: Backing,
    /// The external data file; absent: the one that the image names.
    pub data_file: Option<Child>,
    /// The method, and the name of the secret.
    pub encrypt: Option<(Crypt, Option<String>)>,
    /// Everything else; `encrypt` is set from that, `read_only` is set from the node's.
    pub options: Options,
}

impl Qcow2Plan {
    /// With default options, on `file`.
    pub fn new(file: Child) -> Qcow2Plan {
        Qcow2Plan {
            file,
            backing: Backing::FromImage,
            data_file: None,
            encrypt: None,
            options: Options::default(),
        }
    }
}

impl Open for Qcow2Plan {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let file = cx.file(self.file)?;
        let node = file.need()?;
        // A file that turned out to be readable only makes the image so.
        if node.read_only() && cx.options.auto_read_only {
            cx.options.read_only = true;
        }
        let says = |e: std::io::Error| Error::new(strerror(&e));
        let header = open::read_header(&node).map_err(says)?;
        let encrypt = match self.encrypt {
            Some((method, secret)) => {
                // What does not fit is told before the secret is looked for.
                crypt::check(header.crypt, Some(method)).map_err(says)?;
                let password = secret.as_deref().map(|id| cx.secret(id)).transpose()?;
                Some(Unlock { method, password, secret })
            }
            None => None,
        };
        let data_file = match (header.needs_data_file(), self.data_file, &header.data_file) {
            (true, Some(child), _) => Some(child),
            (true, None, Some(name)) => Some(cx.named(name)?),
            (true, None, None) => None,
            (false, child, _) => child,
        };
        let data_file = match data_file {
            Some(child) => Some(cx.child("data-file", child, perm::for_data((Perm::NONE, Perm::ALL)))?),
            None => None,
        };
        let named = header.backing_file.as_deref().map(|n| (n, header.backing_format.as_deref()));
        let backing = cx.backing(self.backing, &file, named)?;
        let on_corrupt = cx.events().map(|events| {
            let node_name = cx.name().to_string();
            let tell = move |c: &Corruption| {
                let (node_name, msg) = (node_name.clone(), c.msg.clone());
                events.post(Event::ImageCorrupted { node_name, msg, at: c.at, fatal: c.fatal });
            };
            Box::new(tell) as OnCorrupt
        });
        let options = Options { read_only: cx.options.read_only, encrypt, on_corrupt, ..self.options };
        Ok(Box::new(open::open(file, backing, data_file, options).map_err(says)?))
    }
}
