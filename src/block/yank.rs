//! What can hang and be let go from outside: nodes whose storage is behind a network.
//!
//! Owns: a list of names, each with what to do. Never: knows the graph: whoever waits for a disk may
//! be the control thread itself, so that others must get along without it. Threads: the control
//! thread enters and takes out; any looks, and pulls. Locks: the list's, for moments; it is not held
//! while something is pulled.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Pull = Arc<dyn Fn() + Send + Sync>;

/// The list; its clones are one list.
#[derive(Clone, Default)]
pub struct Yanks(Arc<Mutex<List>>);

#[derive(Default)]
struct List {
    serial: u64,
    all: Vec<(u64, String, Pull)>,
}

/// A place in the list; dropping it is leaving.
pub struct Yankable {
    yanks: Yanks,
    serial: u64,
}

impl Yanks {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the node of that name. `pull` must not wait for anything.
    pub fn enter(&self, node: &str, pull: impl Fn() + Send + Sync + 'static) -> Yankable {
        let mut list = self.lock();
        list.serial += 1;
        let serial = list.serial;
        list.all.push((serial, node.into(), Arc::new(pull)));
        drop(list);
        Yankable { yanks: self.clone(), serial }
    }

    /// The names of all nodes in it, newest first.
    pub fn nodes(&self) -> Vec<String> {
        self.lock().all.iter().rev().map(|(_, name, _)| name.clone()).collect()
    }

    /// Lets everything go that waits for these nodes. False, and nothing is done, when one of them is
    /// not in the list.
    pub fn pull(&self, nodes: &[&str]) -> bool {
        let list = self.lock();
        if !nodes.iter().all(|n| list.all.iter().any(|(_, name, _)| name == n)) {
            return false;
        }
        let wanted = list.all.iter().filter(|(_, name, _)| nodes.contains(&name.as_str()));
        let pulls: Vec<Pull> = wanted.map(|(_, _, pull)| pull.clone()).collect();
        drop(list);
        pulls.iter().for_each(|pull| pull());
        true
    }
}

impl Drop for Yankable {
    fn drop(&mut self) {
        self.yanks.lock().all.retain(|(serial, _, _)| *serial != self.serial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn all_or_none_are_pulled_and_who_has_left_is_not() {
        let yanks = Yanks::default();
        let count = Arc::new(AtomicUsize::new(0));
        let enter = |name: &str| {
            let count = count.clone();
            yanks.enter(name, move || {
                count.fetch_add(1, Ordering::SeqCst);
            })
        };
        let (a, _b) = (enter("a"), enter("b"));
        assert_eq!(yanks.nodes(), ["b", "a"]);
        assert!(!yanks.pull(&["a", "c"]) && count.load(Ordering::SeqCst) == 0);
        assert!(yanks.pull(&["a", "b"]) && count.load(Ordering::SeqCst) == 2);
        drop(a);
        assert!(!yanks.pull(&["a"]) && yanks.pull(&[]));
        assert_eq!((yanks.nodes(), count.load(Ordering::SeqCst)), (vec!["b".to_string()], 2));
    }
}
