//! The hands of a connection: threads that do requests which wait for a disk, so that the one who
//! receives need not.
//!
//! Owns: who is idle, and the data buffers of those. A request travels with the buffer that its
//! payload is in; the one who gives it away gets the idle hand's buffer for it, so that no buffer is
//! made, and page-faulted in, for a request. The hand that became idle last is taken first: it is the
//! warmest. Never: knows what a request is. Threads: the connection's: one gives, the others do.
//! Locks: the list's, then a hand's own; both for moments.

use super::reply::Buffer;
use crate::sys::thread::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// See the module's head. `T`: a request.
pub(super) struct Crew<T> {
    state: Mutex<State<T>>,
    /// So many hands at most.
    most: usize,
}

struct State<T> {
    idle: Vec<(Arc<Hand<T>>, Buffer)>,
    /// How many hands there are.
    there: usize,
    over: bool,
}

/// What a hand waits for.
pub(super) struct Hand<T> {
    task: Mutex<Task<T>>,
    given: Condvar,
}

enum Task<T> {
    None,
    Do(T, Buffer),
    Leave,
}

impl<T> Hand<T> {
    fn put(&self, task: Task<T>) {
        *lock(&self.task) = task;
        self.given.notify_one();
    }

    /// Waits for a request. `None`: it is time to go.
    pub fn take(&self) -> Option<(T, Buffer)> {
        let mut task = lock(&self.task);
        loop {
            match std::mem::replace(&mut *task, Task::None) {
                Task::None => task = self.given.wait(task).unwrap_or_else(PoisonError::into_inner),
                Task::Do(request, buffer) => return Some((request, buffer)),
                Task::Leave => return None,
            }
        }
    }
}

impl<T> Crew<T> {
    /// Nobody yet.
    pub fn new(most: usize) -> Crew<T> {
        Crew { state: Mutex::new(State { idle: Vec::new(), there: 0, over: false }), most }
    }

    /// Gives a request to somebody, with the buffer, in whose place the somebody's own comes.
    /// `hire` makes a thread that works as that hand. When there is nobody, the request comes back.
    pub fn give(
        &self,
        request: T,
        buffer: &mut Buffer,
        hire: impl FnOnce(Arc<Hand<T>>) -> bool,
    ) -> Result<(), T> {
        let mut state = lock(&self.state);
        let idle = state.idle.pop();
        let may_hire = idle.is_none() && state.there < self.most;
        state.there += usize::from(may_hire);
        drop(state);
        let (hand, other) = match idle {
            Some(idle) => idle,
            None if !may_hire => return Err(request),
            None => {
                let hand = Arc::new(Hand { task: Mutex::new(Task::None), given: Condvar::new() });
                if !hire(hand.clone()) {
                    lock(&self.state).there -= 1;
                    return Err(request);
                }
                (hand, buffer.another())
            }
        };
        hand.put(Task::Do(request, std::mem::replace(buffer, other)));
        Ok(())
    }

    /// The hand has nothing to do and waits. `None`: it is time to go.
    pub fn next(&self, hand: &Arc<Hand<T>>, buffer: Buffer) -> Option<(T, Buffer)> {
        let mut state = lock(&self.state);
        if state.over {
            return None;
        }
        state.idle.push((hand.clone(), buffer));
        drop(state);
        hand.take()
    }

    /// Whether more than one hand is at work.
    pub fn is_busy(&self) -> bool {
        let state = lock(&self.state);
        state.there > state.idle.len() + 1
    }

    /// Nothing more will be given: hands go when they have done what they have.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.over = true;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        idle.iter().for_each(|(hand, _)| hand.put(Task::Leave));
    }
}
