//! The one owner: the VM, its run state, and the event loop.
