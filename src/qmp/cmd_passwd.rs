//! `block_passwd`: the password of an encrypted image, as it was given until QEMU 5.1.
//!
//! Owns: its form. Never: ciphers. Threads: control. Locks: none.

use super::cmd_blockdev::find_node;
use super::schema::Cx;
use crate::error::Result;
use crate::{bail, commands};

commands! {
    /// Passwords.
    pub static PASSWD;

    /// Gives the password of an encrypted image. Here an image is unlocked when it is opened (with
    /// `encrypt.key-secret` of `blockdev-add`), so that this only tells whether it is right.
    "block_passwd" => block_passwd {
        /// The drive's name. One of `device` and `node-name` is needed.
        device: Option<String>,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// The password.
        password: String,
    } -> ();
}

fn block_passwd(
    cx: &mut Cx,
    device: Option<String>,
    node_name: Option<String>,
    password: String,
) -> Result<()> {
    let node = find_node(cx, device.as_deref(), node_name.as_deref())?;
    match node.driver.check_password(password.as_bytes()) {
        Ok(true) => Ok(()),
        Ok(false) => bail!("Password incorrect"),
        Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => match (device, node_name) {
            (Some(name), _) => bail!("Device '{name}' is not encrypted"),
            (None, name) => bail!("Node '{}' is not encrypted", name.unwrap_or_default()),
        },
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
#[path = "cmd_passwd_test.rs"]
mod tests;
