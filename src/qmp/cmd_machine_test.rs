use crate::control::vm::{Settings, Vm};
use crate::event::Event;
use crate::machine::cpu::Topology;
use crate::machine::{Accel, Machine, MachineConfig};
use crate::qmp::fds::Conn;
use crate::qmp::schema::{Cx, execute};
use serde_json::{Value, json};

struct Client {
    vm: Vm,
    conn: Conn,
}

impl Client {
    fn new(settings: Settings) -> Client {
        let mut vm = Vm::new(settings).unwrap();
        let config = MachineConfig { memory: 16 << 20, topology: vm.settings.topology, accel: Accel::None };
        vm.machine = Some(Machine::new(&config, vm.events.clone()).unwrap());
        Client { vm, conn: Conn::new() }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let Value::Object(arguments) = arguments else { panic!() };
        let mut cx = Cx { vm: &mut self.vm, conn: &mut self.conn };
        execute(&mut cx, command, arguments).unwrap_or_else(|e| json!({"error": e.desc}))
    }

    fn status(&mut self) -> String {
        let v = self.ask("query-status", json!({}));
        assert_eq!(v["running"], json!(v["status"] == "running"));
        v["status"].as_str().unwrap().to_string()
    }

    fn events(&mut self) -> Vec<&'static str> {
        self.vm.outbox.drain(..).map(|e| e.name).collect()
    }
}

/// The dialogue recorded from QEMU 10.0.2 about stop, cont and reset.
#[test]
fn run_states_and_events_are_qemus() {
    let mut c = Client::new(Settings::default());
    assert_eq!(c.status(), "prelaunch");
    assert_eq!(c.ask("stop", json!({})), json!({}));
    assert_eq!((c.status(), c.events()), ("prelaunch".into(), vec![]));
    c.ask("cont", json!({}));
    c.ask("cont", json!({}));
    assert_eq!((c.status(), c.events()), ("running".into(), vec!["RESUME"]));
    c.ask("stop", json!({}));
    c.ask("stop", json!({}));
    assert_eq!((c.status(), c.events()), ("paused".into(), vec!["STOP"]));
    c.ask("system_reset", json!({}));
    assert_eq!((c.status(), c.events()), ("prelaunch".into(), vec!["RESET"]));
    c.ask("system_powerdown", json!({}));
    assert_eq!((c.status(), c.events()), ("prelaunch".into(), vec!["POWERDOWN"]));
    c.ask("cont", json!({}));
    c.ask("system_reset", json!({}));
    assert_eq!((c.status(), c.events()), ("running".into(), vec!["RESUME", "RESET"]));
    c.ask("set-action", json!({"shutdown": "pause", "reboot": "shutdown"}));
    c.vm.handle(Event::Reset);
    assert_eq!((c.status(), c.events()), ("shutdown".into(), vec!["SHUTDOWN", "STOP"]));
    c.ask("set-action", json!({"reboot": "reset"}));
    c.ask("system_reset", json!({}));
    c.ask("cont", json!({}));
    c.vm.handle(Event::Reset);
    assert_eq!((c.status(), c.events()), ("running".into(), vec!["RESET", "RESUME", "RESET"]));
    c.vm.attended = true;
    c.vm.handle(Event::VcpuFailed { cpu: 0, why: "test".into() });
    assert_eq!(c.status(), "internal-error");
    assert_eq!(c.ask("cont", json!({})), json!({"error": "Resetting the Virtual Machine is required"}));
    c.events();
    c.ask("quit", json!({}));
    assert_eq!((c.vm.exit(), c.events()), (Some(0), vec!["SHUTDOWN"]));
}

#[test]
fn names_and_processors() {
    let mut c = Client::new(Settings::default());
    assert_eq!(c.ask("query-name", json!({})), json!({}));
    assert_eq!(c.ask("query-uuid", json!({})), json!({"UUID": "00000000-0000-0000-0000-000000000000"}));
    let mut uuid = [0; 16];
    uuid.iter_mut().enumerate().for_each(|(i, b)| *b = (i as u8) << 4);
    let topology = Topology::new(4, None, None, Some(2)).unwrap();
    let settings =
        Settings { name: Some("vm7".into()), uuid, accel: Accel::None, topology, ..Settings::default() };
    let mut c = Client::new(settings);
    assert_eq!(c.ask("query-name", json!({})), json!({"name": "vm7"}));
    assert_eq!(c.ask("query-uuid", json!({})), json!({"UUID": "00102030-4050-6070-8090-a0b0c0d0e0f0"}));
    assert_eq!(c.ask("query-kvm", json!({})), json!({"enabled": false, "present": true}));
    assert_eq!(c.ask("query-target", json!({})), json!({"arch": "x86_64"}));
    let pid = std::process::id();
    let fast = c.ask("query-cpus-fast", json!({}));
    assert_eq!(fast.as_array().unwrap().len(), 4);
    assert_eq!(
        fast[3],
        json!({"cpu-index": 3, "qom-path": "/machine/unattached/device[3]", "thread-id": pid, "target": "x86_64",
               "props": {"socket-id": 0, "core-id": 1, "thread-id": 1}})
    );
    let wrong = json!({"error": "Parameter 'index' expects a CPU number"});
    assert_eq!(c.ask("cpu", json!({"index": 4})), wrong);
    assert_eq!(c.ask("cpu", json!({"index": -1})), wrong);
    assert_eq!(c.ask("cpu", json!({"index": 1})), json!({}));
    let old = c.ask("query-cpus", json!({}));
    let current: Vec<_> = old.as_array().unwrap().iter().map(|c| c["current"].as_bool().unwrap()).collect();
    assert_eq!(current, [false, true, false, false]);
    assert_eq!(
        old[0],
        json!({"CPU": 0, "current": false, "halted": true, "qom_path": "/machine/unattached/device[0]",
               "thread_id": pid, "arch": "x86", "pc": old[0]["pc"]})
    );
}
