//! The tiny guest in the real binary on /dev/kvm.

mod kit;
