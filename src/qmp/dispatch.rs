//! One request to one reply: the checks on the request's own members, and on the mode.
//!
//! Owns: the order and texts of these checks. Never: what a command does, bytes. Threads: control; a
//! client's own, for what it runs out of band. Locks: none.

use super::schema::{self, Cx, Object, Value, Yanks};
use super::wire::Message;
use crate::error::{Class, Error, Result};
use serde_json::json;

/// Answers a message: runs the command, or says why not.
pub fn answer(cx: &mut Cx, message: Message) -> Value {
    let mut request = match message {
        Ok(Value::Object(request)) => request,
        Ok(_) => return reply(Err(Error::new("QMP input must be a JSON object")), None),
        Err(text) => return reply(Err(Error::new(text)), None),
    };
    let id = request.remove("id");
    reply(run(cx, request), id)
}

/// Answers a request that has `exec-oob`, of a client that has enabled it: runs the command here and
/// now, or says why not.
pub fn answer_oob(yanks: &Yanks, mut request: Object) -> Value {
    let id = request.remove("id");
    let run = || {
        let request = check(request, true)?;
        let name = request.command.as_str();
        let command = schema::find(name).ok_or_else(|| schema::not_found(name))?;
        log::debug!("QMP: {name}, out of band");
        command.oob.ok_or_else(|| no_oob(name))?(yanks, request.args)
    };
    reply(run(), id)
}

fn no_oob(name: &str) -> Error {
    Error::new(format!("The command {name} does not support OOB"))
}

fn reply(result: Result<Value>, id: Option<Value>) -> Value {
    let mut out = Object::new();
    match result {
        Ok(value) => out.insert("return".into(), value),
        Err(e) => out.insert("error".into(), json!({ "class": e.class.as_str(), "desc": e.desc })),
    };
    if let Some(id) = id {
        out.insert("id".into(), id);
    }
    Value::Object(out)
}

/// What a request asks for.
struct Request {
    command: String,
    /// `exec-oob` instead of `execute`.
    oob: bool,
    args: Object,
}

fn run(cx: &mut Cx, request: Object) -> Result<Value> {
    let request = check(request, cx.conn.oob)?;
    let name = request.command.as_str();
    let command = schema::find(name);
    if !cx.conn.negotiated && name != "qmp_capabilities" {
        let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
        return Err(Error::of(Class::CommandNotFound, text));
    }
    let Some(command) = command else { return Err(schema::not_found(name)) };
    // It is only here, and not in `answer_oob`, when its client has no thread of its own.
    if request.oob && command.oob.is_none() {
        return Err(no_oob(name));
    }
    log::debug!("QMP: {name}");
    (command.run)(cx, request.args)
}

fn check(request: Object, oob_enabled: bool) -> Result<Request> {
    let mut command: Option<(String, bool)> = None;
    let mut args = Object::new();
    for (key, value) in request {
        let oob = key == "exec-oob";
        if key == "execute" || (oob && oob_enabled) {
            let Value::String(name) = value else {
                return Err(Error::new(format!("QMP input member '{key}' must be a string")));
            };
            if command.is_some() {
                return Err(Error::new("QMP input member 'execute' clashes with 'exec-oob'"));
            }
            command = Some((name, oob));
        } else if key == "arguments" {
            let Value::Object(map) = value else {
                return Err(Error::new("QMP input member 'arguments' must be an object"));
            };
            args = map;
        } else {
            return Err(Error::new(format!("QMP input member '{key}' is unexpected")));
        }
    }
    match command {
        Some((command, oob)) => Ok(Request { command, oob, args }),
        None => Err(Error::new("QMP input lacks member 'execute'")),
    }
}

/// What a client is sent at once when it connects.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": schema::Wire::give(super::cmd_core::version()), "capabilities": ["oob"] } })
}
