//! P: what the farm does for its callers. An operation looks things up, asks the desk or commits, and says why not.

use alloy_shared::id::Digest;
use alloy_shared::wire::{ErrorCode, FieldError};

use crate::store::StoreError;

pub mod access;
pub mod archive;
pub mod images;
pub mod job;
pub mod members;
pub mod retention;
pub mod upload;
pub mod workers;

/// Why an operation did not happen. `error.rs` turns it into a problem document.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The caller's doing, or the farm's state: says what and what to do.
    #[error("{message}")]
    Refused { code: ErrorCode, message: String, hint: Option<String>, errors: Vec<FieldError> },
    /// Blobs that must be uploaded first.
    #[error("{} blobs of the source are missing", .0.len())]
    Missing(Vec<Digest>),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Reading or writing bytes failed.
    #[error("{what}: {error}")]
    Io { what: &'static str, error: std::io::Error },
}

impl OpError {
    pub fn refused(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Refused { code, message: message.into(), hint: None, errors: Vec::new() }
    }
    pub fn not_found(what: &str) -> Self {
        Self::refused(ErrorCode::NotFound, format!("there is no such {what}, or it is not yours"))
    }
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        if let Self::Refused { hint, .. } = &mut self {
            *hint = Some(text.into());
        }
        self
    }
}
