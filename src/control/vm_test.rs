use super::*;

fn vm(settings: Settings) -> Vm {
    Vm::new(settings).unwrap()
}

/// What has been emitted: name, and the data as text.
fn emitted(vm: &mut Vm) -> Vec<String> {
    vm.outbox
        .drain(..)
        .map(|e| match e.data {
            Some(d) => format!("{} {}", e.name, Value::Object(d)),
            None => e.name.to_string(),
        })
        .collect()
}

#[test]
fn stop_and_cont_are_silent_when_there_is_nothing_to_do() {
    let mut vm = vm(Settings::default());
    vm.stop(RunState::Paused);
    assert_eq!((vm.run_state, emitted(&mut vm).len()), (RunState::Prelaunch, 0));
    vm.cont().unwrap();
    vm.cont().unwrap();
    assert_eq!(emitted(&mut vm), ["RESUME"]);
    vm.stop(RunState::Paused);
    vm.stop(RunState::Paused);
    assert_eq!((vm.run_state, emitted(&mut vm)), (RunState::Paused, vec!["STOP".to_string()]));
    vm.reset(Cause::HostQmpSystemReset);
    assert_eq!(vm.run_state, RunState::Prelaunch);
    assert_eq!(emitted(&mut vm), [r#"RESET {"guest":false,"reason":"host-qmp-system-reset"}"#]);
}

#[test]
fn a_guest_that_switches_off_obeys_the_policy() {
    let mut off = vm(Settings::default());
    off.cont().unwrap();
    off.handle(Event::Shutdown);
    off.handle(Event::Shutdown);
    assert_eq!(off.exit(), Some(0));
    assert_eq!(emitted(&mut off), ["RESUME", r#"SHUTDOWN {"guest":true,"reason":"guest-shutdown"}"#]);

    let mut pause = vm(Settings { shutdown: ShutdownAction::Pause, ..Settings::default() });
    pause.cont().unwrap();
    pause.handle(Event::Shutdown);
    assert_eq!((pause.exit(), pause.run_state), (None, RunState::Shutdown));
    assert_eq!(emitted(&mut pause)[1..], [r#"SHUTDOWN {"guest":true,"reason":"guest-shutdown"}"#, "STOP"]);
    let error = pause.cont().unwrap_err();
    assert_eq!(error.desc, "Resetting the Virtual Machine is required");
    pause.reset(Cause::HostQmpSystemReset);
    pause.cont().unwrap();
    assert_eq!(pause.run_state, RunState::Running);
}

#[test]
fn a_guest_reset_resets_or_shuts_down() {
    let mut reset = vm(Settings::default());
    reset.cont().unwrap();
    reset.handle(Event::Reset);
    assert_eq!((reset.exit(), reset.run_state), (None, RunState::Running));
    assert_eq!(emitted(&mut reset)[1..], [r#"RESET {"guest":true,"reason":"guest-reset"}"#]);

    let mut off = vm(Settings { reboot: RebootAction::Shutdown, ..Settings::default() });
    off.cont().unwrap();
    off.handle(Event::Reset);
    assert_eq!(off.exit(), Some(0));
    assert_eq!(emitted(&mut off)[1..], [r#"SHUTDOWN {"guest":true,"reason":"guest-reset"}"#]);
}

#[test]
fn a_failing_disk_stops_the_vm_only_when_its_policy_says_so() {
    let error = |action| {
        Event::BlockIoError(BlockIoError {
            qom_path: "/machine/peripheral/vd0".into(),
            device: "drive0".into(),
            node_name: None,
            read: false,
            action,
            nospace: true,
            reason: "No space left on device".into(),
        })
    };
    let mut vm = vm(Settings::default());
    vm.cont().unwrap();
    vm.handle(error(ErrorAction::Report));
    assert_eq!(vm.run_state, RunState::Running);
    vm.outbox.clear();
    vm.handle(error(ErrorAction::Stop));
    assert_eq!(vm.run_state, RunState::IoError);
    let names: Vec<_> = vm.outbox.iter().map(|e| e.name).collect();
    assert_eq!(names, ["BLOCK_IO_ERROR", "STOP"]);
    let data = vm.outbox[0].data.as_ref().unwrap();
    assert_eq!((&data["operation"], &data["action"]), (&json!("write"), &json!("stop")));
    assert!(!data.contains_key("node-name"));
    vm.cont().unwrap();
    assert_eq!(vm.run_state, RunState::Running);

    // It fails just when a client stops the VM and lets it go on at once.
    vm.stop(RunState::Paused);
    vm.outbox.clear();
    vm.events.post(error(ErrorAction::Stop));
    vm.cont().unwrap();
    vm.take_events();
    assert_eq!(vm.run_state, RunState::Running);
    assert_eq!(vm.outbox.iter().map(|e| e.name).collect::<Vec<_>>(), ["BLOCK_IO_ERROR", "RESUME"]);
}

#[test]
fn a_cpu_that_cannot_go_on_stops_the_vm_and_ends_one_that_nobody_attends() {
    for attended in [true, false] {
        let mut vm = vm(Settings::default());
        vm.attended = attended;
        vm.cont().unwrap();
        vm.handle(Event::VcpuFailed { cpu: 0, why: "test".into() });
        assert_eq!(vm.run_state, RunState::InternalError);
        assert_eq!(emitted(&mut vm), ["RESUME", "STOP"]);
        assert_eq!(vm.exit(), if attended { None } else { Some(1) });
        assert_eq!(vm.cont().unwrap_err().desc, "Resetting the Virtual Machine is required");
    }
}

#[test]
fn two_processors_that_ask_for_a_reset_get_one() {
    let mut vm = vm(Settings::default());
    vm.cont().unwrap();
    vm.events.post(Event::Reset);
    vm.events.post(Event::RtcChange { offset: 1 });
    vm.handle(Event::Reset);
    for event in vm.events.take() {
        vm.handle(event);
    }
    let names: Vec<_> = vm.outbox.iter().map(|e| e.name).collect();
    assert_eq!(names, ["RESUME", "RESET", "RTC_CHANGE"]);
}

/// What a process leaves open is closed by its end; of KVM's virtual machine that takes long.
#[test]
fn a_machine_that_goes_lets_go_of_the_virtual_machine() {
    let mut vm = vm(Settings::default());
    let config = crate::machine::MachineConfig {
        memory: 16 << 20,
        accel: crate::machine::Accel::None,
        ..Default::default()
    };
    let mut machine = Machine::new(&config, vm.events.clone()).unwrap();
    vm.board = Some(Board::new(&mut machine).unwrap());
    // The interrupt controllers hold its descriptor, where there is KVM.
    let held = Arc::downgrade(&machine.interrupts);
    vm.machine = Some(machine);
    let rng = json!({ "driver": "virtio-rng-pci" });
    vm.add_device(rng.as_object().unwrap(), false).unwrap();
    drop(vm);
    assert_eq!(held.strong_count(), 0, "something holds the interrupt controllers");
}
