//! S: what the engines' errors mean to a caller.

use std::time::Duration;

use sqlx::error::{DatabaseError, ErrorKind};

use crate::store::StoreError;

/// Why a group could not be written.
#[derive(Debug)]
pub(super) enum Fault {
    /// A rule of the schema refuses the row. It concerns this group alone.
    Refused(String),
    /// The database itself: it concerns the whole commit.
    Store(StoreError),
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(db) if is_refusal(db.as_ref()) => Self::Refused(db.message().to_owned()),
            _ => Self::Store(of(error)),
        }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A constraint, or a value that its column cannot hold.
fn is_refusal(db: &dyn DatabaseError) -> bool {
    match db.kind() {
        ErrorKind::UniqueViolation
        | ErrorKind::ForeignKeyViolation
        | ErrorKind::NotNullViolation
        | ErrorKind::CheckViolation
        | ErrorKind::ExclusionViolation => true,
        _ => match code(db) {
            Code::Sqlite(primary) => primary == SQLITE_CONSTRAINT || primary == SQLITE_TOOBIG,
            Code::Postgres(state) => state.starts_with("22") || state.starts_with("23"),
        },
    }
}

const SQLITE_IOERR: i32 = 10;
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_TOOBIG: i32 = 18;
const SQLITE_CONSTRAINT: i32 = 19;
const SQLITE_NOTADB: i32 = 26;

enum Code {
    /// The low byte of the extended code.
    Sqlite(i32),
    /// Five characters.
    Postgres(String),
}

fn code(db: &dyn DatabaseError) -> Code {
    let text = db.code().unwrap_or_default();
    // A SQLSTATE is five characters, also when all are digits; no code of SQLite is that long.
    match text.parse::<i32>() {
        Ok(number) if text.len() < 5 => Code::Sqlite(number & 0xff),
        Ok(_) | Err(_) => Code::Postgres(text.into_owned()),
    }
}

/// An error before the commit was asked for: nothing has happened.
pub(super) fn of(error: sqlx::Error) -> StoreError {
    let text = error.to_string();
    match &error {
        sqlx::Error::Database(db) => match code(db.as_ref()) {
            Code::Sqlite(SQLITE_FULL) => StoreError::Full(text),
            Code::Sqlite(SQLITE_CORRUPT | SQLITE_NOTADB) => damaged(text),
            Code::Sqlite(_) => StoreError::Unavailable(text),
            Code::Postgres(state) => match state.as_str() {
                "53100" => StoreError::Full(text),
                "XX001" | "XX002" => damaged(text),
                _ => StoreError::Unavailable(text),
            },
        },
        _ => StoreError::Unavailable(text),
    }
}

/// An error of the commit itself: unless the engine says that it refused, nobody knows.
pub(super) fn of_commit(error: sqlx::Error) -> StoreError {
    let refused = match &error {
        sqlx::Error::Database(db) => match code(db.as_ref()) {
            Code::Sqlite(primary) => primary != SQLITE_IOERR,
            // The connection went down (08, 57), or completion is unknown (40003).
            Code::Postgres(state) => !(state.starts_with("08") || state.starts_with("57") || state == "40003"),
        },
        _ => false,
    };
    if refused { of(error) } else { StoreError::Unknown(error.to_string()) }
}

fn damaged(text: String) -> StoreError {
    StoreError::Corrupt { table: "database", id: text, column: "a page" }
}

/// Waits for the database no longer than this.
pub(super) async fn within<T>(
    limit_ms: u64,
    late: fn(String) -> StoreError,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(Duration::from_millis(limit_ms), work).await {
        Ok(result) => result,
        Err(_) => Err(late(format!("no answer within {limit_ms} ms"))),
    }
}
