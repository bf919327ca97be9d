//! What a command is: one definition gives argument parsing with QEMU's texts, `query-commands`,
//! `query-qmp-schema` and the reference text of `--help-qmp`.
//!
//! Owns: [`Command`], the macro [`commands!`](crate::commands), the look-up. Never: knows any one
//! command (`super::TABLES` lists the tables), or bytes. Threads: control. Locks: none.

use super::fds::Conn;
pub use crate::block::yank::Yanks;
use crate::control::vm::Vm;
use crate::error::{Class, Error, Result};
pub use crate::qapi::*;

use std::collections::HashMap;
use std::sync::OnceLock;

/// What a handler works with: the VM, and the monitor that asks.
pub struct Cx<'a> {
    /// Everything that has a name.
    pub vm: &'a mut Vm,
    /// The monitor: its named and pending file descriptors, its negotiation.
    pub conn: &'a mut Conn,
}

/// One command. Made by [`commands!`](crate::commands).
pub struct Command {
    /// Its name on the wire.
    pub name: &'static str,
    /// Other names that do the same (older or newer than the first).
    pub aliases: &'static [&'static str],
    /// Its documentation, line by line.
    pub doc: &'static [&'static str],
    /// The object that its arguments are.
    pub args: Ty,
    /// What it answers.
    pub returns: Ty,
    /// How it runs out of band (`exec-oob`), if it may: on the client's own thread, while the control
    /// thread may be waiting for what it is to free.
    pub oob: Option<fn(&Yanks, Object) -> Result<Value>>,
    /// Takes the arguments apart and calls the handler.
    pub run: fn(&mut Cx, Object) -> Result<Value>,
}

/// Every name with its command, aliases included.
pub fn names() -> impl Iterator<Item = (&'static str, &'static Command)> {
    super::TABLES
        .iter()
        .flat_map(|table| table.iter())
        .flat_map(|c| std::iter::once((c.name, c)).chain(c.aliases.iter().map(move |a| (*a, c))))
}

/// The command called `name`.
pub fn find(name: &str) -> Option<&'static Command> {
    static INDEX: OnceLock<HashMap<&'static str, &'static Command>> = OnceLock::new();
    INDEX.get_or_init(|| names().collect()).get(name).copied()
}

/// Runs the command called `name`.
pub fn execute(cx: &mut Cx, name: &str, args: Object) -> Result<Value> {
    match find(name) {
        Some(command) => (command.run)(cx, args),
        None => Err(not_found(name)),
    }
}

/// The error for a command that does not exist.
pub fn not_found(name: &str) -> Error {
    Error::of(Class::CommandNotFound, format!("The command {name} has not been found"))
}

/// Declares a table of commands and, for each, how its arguments come to its handler.
///
/// ```text
/// commands! {
///     /// File descriptors.
///     pub static FD;
///
///     /// Keeps the file descriptor that came with the request, under a name.
///     "getfd" => getfd {
///         /// The name; must not begin with a digit.
///         fdname: String,
///     } -> ();
///
///     /// Adds a node. (Aliases follow the name; a type in parentheses is the whole arguments.)
///     "blockdev-add" | "x-blockdev-add" => blockdev_add(BlockdevOptions) -> ();
///
///     /// May run out of band: its handler gets no VM, only what it can free.
///     oob "yank" => yank { instances: Vec<YankInstance> } -> ();
/// }
///
/// fn getfd(cx: &mut Cx, fdname: String) -> Result<()> { … }
/// fn blockdev_add(cx: &mut Cx, options: BlockdevOptions) -> Result<()> { … }
/// fn yank(yanks: &Yanks, instances: Vec<YankInstance>) -> Result<()> { … }
/// ```
///
/// Fields are written as in [`wire_struct!`](crate::wire_struct): a name on the wire that is not
/// the Rust name stands before it, `Option<T>` may be absent, `Rest` takes all other members.
#[macro_export]
macro_rules! commands {
    (
        $(#[doc = $tdoc:literal])*
        $vis:vis static $TABLE:ident;
        $(
            $(#[doc = $doc:literal])*
            $($oob:ident)? $name:literal $(| $alias:literal)* => $handler:ident $args:tt -> $Ret:ty;
        )*
    ) => {
        $(#[doc = $tdoc])*
        $vis static $TABLE: &[$crate::qmp::schema::Command] = &[$(
            $crate::qmp::schema::Command {
                name: $name,
                aliases: &[$($alias),*],
                doc: &[$($doc),*],
                args: $crate::command_args!(type concat!($name, "-arg"), $args),
                returns: <$Ret as $crate::qapi::Wire>::TY,
                oob: $crate::command_args!(oob [$($oob)?] $handler, $args, $Ret),
                run: $crate::command_args!(run [$($oob)?] $handler, $args, $Ret),
            }
        ),*];
    };
}

/// The parts of [`commands!`] that depend on how arguments are declared.
#[doc(hidden)]
#[macro_export]
macro_rules! command_args {
    (oob [] $handler:ident, $args:tt, $Ret:ty) => { None };
    (oob [oob] $handler:ident, $args:tt, $Ret:ty) => {
        Some(|yanks, args| {
            let result: $Ret = $crate::command_args!(call $handler, yanks, args, $args);
            Ok($crate::qapi::Wire::give(result))
        })
    };
    (run [] $handler:ident, $args:tt, $Ret:ty) => {
        |cx, args| {
            let result: $Ret = $crate::command_args!(call $handler, cx, args, $args);
            Ok($crate::qapi::Wire::give(result))
        }
    };
    (run [oob] $handler:ident, $args:tt, $Ret:ty) => {
        |cx, args| {
            let yanks = cx.vm.graph.yanks();
            let result: $Ret = $crate::command_args!(call $handler, yanks, args, $args);
            Ok($crate::qapi::Wire::give(result))
        }
    };
    (type $name:expr, ($T:ty)) => { <$T as $crate::qapi::Wire>::TY };
    (type $name:expr, {}) => { <$crate::qapi::Empty as $crate::qapi::Wire>::TY };
    (type $name:expr, { $(
        $(#[doc = $fdoc:literal])*
        $($wire:literal)? $field:ident : $T:ty
    ),* $(,)? }) => {
        $crate::qapi::Ty::Named($name, || {
            let mut list = Vec::new();
            $( <$T as $crate::qapi::Wire>::describe_member(
                $crate::wire_name!($($wire)? $field),
                &[$($fdoc),*],
                &mut list,
            ); )*
            $crate::qapi::Def::Object(list)
        })
    };
    (call $handler:ident, $cx:ident, $args:ident, ($T:ty)) => {
        $handler(
            $cx,
            <$T as $crate::qapi::Wire>::take(
                ::serde_json::Value::Object($args),
                &$crate::qapi::Path::Root,
            )?,
        )?
    };
    (call $handler:ident, $cx:ident, $args:ident, { $(
        $(#[doc = $fdoc:literal])*
        $($wire:literal)? $field:ident : $T:ty
    ),* $(,)? }) => {{
        #[allow(unused_mut)]
        let mut args = $args;
        $( let $field = <$T as $crate::qapi::Wire>::take_member(
            &mut args,
            $crate::wire_name!($($wire)? $field),
            &$crate::qapi::Path::Root,
        )?; )*
        $crate::qapi::nothing_left(&args, &$crate::qapi::Path::Root)?;
        $handler($cx $(, $field)*)?
    }};
}

#[cfg(test)]
#[path = "schema_test.rs"]
mod tests;
