//! Guest devices that come and go: `device_add`, `device_del`.
//!
//! Owns: the commands' forms. Never: knows a model (`virtio/kinds.rs`). Threads: control. Locks: none.

use super::schema::Cx;
use crate::commands;
use crate::error::Result;
use crate::qapi::{Object, Path, Rest, Ty, Wire};
use serde_json::Value;

commands! {
    /// Guest devices.
    pub static DEVICE;

    /// Adds a guest device. Besides the members below it takes the properties of the model. Disks and
    /// CD drives can be added to a SCSI bus while the guest runs.
    "device_add" => device_add {
        /// The model.
        driver: Lenient,
        /// The bus; by default the first one that the model fits.
        bus: Option<Lenient>,
        /// Its id.
        id: Option<Lenient>,
        /// Properties of the model.
        properties: Rest,
    } -> ();

    /// Removes a guest device. `DEVICE_DELETED` says when it is gone.
    "device_del" => device_del {
        /// Its id or path.
        id: String,
    } -> ();
}

/// A text, of which the model's own check says what is wrong with another value.
struct Lenient(Value);

impl Wire for Lenient {
    const TY: Ty = String::TY;
    fn take(v: Value, _: &Path) -> Result<Lenient> {
        Ok(Lenient(v))
    }
    fn give(self) -> Value {
        self.0
    }
}

fn device_add(
    cx: &mut Cx,
    driver: Lenient,
    bus: Option<Lenient>,
    id: Option<Lenient>,
    properties: Rest,
) -> Result<()> {
    let mut args: Object = properties.0;
    for (name, value) in [("driver", Some(driver)), ("bus", bus), ("id", id)] {
        if let Some(Lenient(value)) = value {
            args.insert(name.into(), value);
        }
    }
    cx.vm.add_device(&args, true)
}

fn device_del(cx: &mut Cx, id: String) -> Result<()> {
    cx.vm.delete_device(&id)
}

#[cfg(test)]
#[path = "cmd_device_test.rs"]
pub(crate) mod tests;
