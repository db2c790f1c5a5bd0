//! D: errors that say that there is no room. They pass, and say nothing about what is on a disk.

use std::io::{Error, ErrorKind};

use nix::errno::Errno;

/// The disk is full.
pub fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// This process or machine can open no more files, or has no more memory.
pub fn is_short(error: &Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw);
    matches!(code, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM))
}
