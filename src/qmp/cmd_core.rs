//! The protocol's own commands: `qmp_capabilities`, and what can be asked about the protocol.
//!
//! Owns: the version that we speak. Never: the VM. Threads: control. Locks: none.

use super::event::EVENTS;
use super::introspect;
use super::schema::{self, Cx, Value};
use crate::error::{Class, Error, Result};
use crate::{commands, wire_enum, wire_struct};

commands! {
    /// The protocol itself.
    pub static CORE;

    /// Ends the negotiation that every connection begins with. Until then no other command runs
    /// and no event is sent.
    "qmp_capabilities" => qmp_capabilities {
        /// Capabilities to enable, out of those that the greeting offers.
        enable: Option<Vec<QMPCapability>>,
    } -> ();

    /// The level of QMP that is spoken, as a version of QEMU, and in `package` the name and
    /// version of this program.
    "query-version" => query_version {} -> VersionInfo;

    /// Every command's name.
    "query-commands" => query_commands {} -> Vec<CommandInfo>;

    /// Every event's name. (QEMU has had only `query-qmp-schema` for this since 6.0.)
    "query-events" => query_events {} -> Vec<EventInfo>;

    /// Every command, event and type, as QEMU's documentation of `SchemaInfo` describes it. Names
    /// of types other than the built-in ones are numbers without meaning.
    "query-qmp-schema" => query_qmp_schema {} -> Vec<Value>;
}

wire_enum! {
    /// A capability of the protocol.
    pub enum QMPCapability {
        /// Out-of-band execution of commands (`exec-oob`).
        "oob" Oob,
    }
}

wire_struct! {
    /// A version of QEMU.
    pub struct VersionTriple {
        /// Major.
        major: i64,
        /// Minor.
        minor: i64,
        /// Micro.
        micro: i64,
    }
}

wire_struct! {
    /// What is spoken, and by whom.
    pub struct VersionInfo {
        /// The QEMU whose QMP this is.
        qemu: VersionTriple,
        /// Name and version of this program.
        package: String,
    }
}

wire_struct! {
    /// A command.
    pub struct CommandInfo {
        /// Its name.
        name: String,
    }
}

wire_struct! {
    /// An event.
    pub struct EventInfo {
        /// Its name.
        name: String,
    }
}

/// `query-version`'s answer; the greeting has it too.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 2 },
        package: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_string(),
    }
}

fn qmp_capabilities(cx: &mut Cx, enable: Option<Vec<QMPCapability>>) -> Result<()> {
    if cx.conn.negotiated {
        return Err(Error::of(
            Class::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        ));
    }
    cx.conn.oob = enable.is_some_and(|list| list.contains(&QMPCapability::Oob));
    cx.conn.negotiated = true;
    Ok(())
}

fn query_version(_: &mut Cx) -> Result<VersionInfo> {
    Ok(version())
}

fn query_commands(_: &mut Cx) -> Result<Vec<CommandInfo>> {
    Ok(schema::names().map(|(name, _)| CommandInfo { name: name.to_string() }).collect())
}

fn query_events(_: &mut Cx) -> Result<Vec<EventInfo>> {
    Ok(EVENTS.iter().map(|e| EventInfo { name: e.name.to_string() }).collect())
}

fn query_qmp_schema(_: &mut Cx) -> Result<Vec<Value>> {
    Ok(introspect::schema())
}
