use super::RunState::{self, *};

#[test]
fn only_what_stopped_may_run_again_and_only_what_runs_may_stop() {
    for from in RunState::ALL {
        for to in RunState::ALL {
            let legal = match (from, to) {
                (a, b) if a == b => true,
                (Running, Prelaunch) => false,
                (Running, _) => true,
                (_, Prelaunch) => true,
                (a, Running) => !a.needs_reset(),
                _ => false,
            };
            assert_eq!(from.may_become(to), legal, "{} to {}", from.as_str(), to.as_str());
        }
    }
    assert!(!Shutdown.may_become(Running) && !InternalError.may_become(Running));
}
