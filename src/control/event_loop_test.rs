use super::*;
use crate::control::vm::Settings;
use crate::event::Event;

#[test]
fn nothing_happens_after_the_end() {
    let mut vm = Vm::new(Settings::default()).unwrap();
    // Two processors at once: one switches off, the other resets.
    vm.events.post(Event::Shutdown);
    vm.events.post(Event::Reset);
    vm.events.post(Event::RtcChange { offset: 1 });
    let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
    assert_eq!(run(&mut vm, &signals, &mut []).unwrap(), 0);
    let names: Vec<_> = vm.outbox.iter().map(|e| e.name).collect();
    assert_eq!(names, ["SHUTDOWN"]);
}
