//! Deliberate breakage of jobs and of what they count on, so that the tests can show that they would
//! notice.
//!
//! Each mutant is a bug that a block job has had somewhere, or could get. A test chooses one for its
//! own thread (`with`), and what that thread makes meanwhile has the bug. Only in this library's own
//! tests: in every other build [`Bug`] is empty, and the compiler removes every question for one.
//!
//! Owns: the list, and a thread's choice. Never: breaks anything itself. Threads: any. Locks: none.

/// A way to break a job; the variant says what goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A mirror's bitmap is marked before the guest's data are there.
    MarkBeforeData,
    /// A mirror clears a granule after it has read it.
    ClearAfterRead,
    /// A mirror does not drain the guest's writes at the switch.
    NoDrain,
    /// A mirror's copy and a guest's write that goes to both sides do not take turns.
    NoTurn,
    /// A mirror does not flush the target before the switch.
    NoFlush,
    /// A mirror forgets a granule that it could not copy.
    NoRemark,
    /// Only clusters that a guest overwrites wholly are copied before.
    PartialCluster,
    /// Copy-before-write comes after the write.
    CopyAfterWrite,
    /// A guest's write does not wait for a copy of its cluster that is under way.
    NoClaimWait,
    /// A cluster of which a guest's write had a part copied counts as copied.
    PartIsWhole,
    /// A job copies a cluster again of which a guest's write had a part copied.
    WholeAgain,
    /// What needs no copy is left out also where somebody is copying.
    LeaveOutTaken,
    /// A backup's bitmap is put aside after the moment that the backup shows.
    LateFreeze,
    /// What was written while a failed backup had the bitmap is forgotten.
    ForgetSuccessor,
    /// A job of a transaction does not wait for the others.
    CommitAlone,
    /// A commit leaves what lies behind the end of a short image.
    NoTail,
    /// A stream does not bring up zeroes that hide what the new backing file has.
    NoZeroes,
}

#[cfg(test)]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// The bug of something, if it has one.
#[derive(Clone, Copy, Debug)]
pub struct Bug {
    #[cfg(test)]
    is: Option<Mutant>,
}

impl Bug {
    /// What the calling thread has chosen.
    pub fn here() -> Bug {
        Bug {
            #[cfg(test)]
            is: CHOSEN.get(),
        }
    }

    /// True when it is this one.
    #[cfg(test)]
    pub fn is(self, mutant: Mutant) -> bool {
        self.is == Some(mutant)
    }

    /// Never true.
    #[cfg(not(test))]
    #[inline(always)]
    pub fn is(self, _: Mutant) -> bool {
        false
    }
}

/// Does something with a bug.
#[cfg(test)]
pub fn with<T>(mutant: Option<Mutant>, f: impl FnOnce() -> T) -> T {
    struct Back(Option<Mutant>);
    impl Drop for Back {
        fn drop(&mut self) {
            CHOSEN.set(self.0);
        }
    }
    let _back = Back(CHOSEN.replace(mutant));
    f()
}
