//! S: what the engines' errors mean to a caller.

use std::time::Duration;

use alloy_shared::limits;
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
/// The index of the log could not grow.
const SQLITE_IOERR_SHMSIZE: i32 = SQLITE_IOERR | 19 << 8;

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

fn extended(db: &dyn DatabaseError) -> Option<i32> {
    db.code()?.parse().ok()
}

/// What SQLite says of a file that is no good database.
pub(super) fn damage(error: &sqlx::Error) -> Option<String> {
    let db = error.as_database_error()?;
    matches!(code(db), Code::Sqlite(SQLITE_CORRUPT | SQLITE_NOTADB)).then(|| db.message().to_owned())
}

/// An error before the commit was asked for: nothing has happened.
pub(super) fn of(error: sqlx::Error) -> StoreError {
    let text = error.to_string();
    match &error {
        sqlx::Error::Database(db) => match code(db.as_ref()) {
            Code::Sqlite(SQLITE_FULL) => StoreError::Full(text),
            Code::Sqlite(SQLITE_CORRUPT | SQLITE_NOTADB) => damaged(text),
            Code::Sqlite(SQLITE_IOERR) if extended(db.as_ref()) == Some(SQLITE_IOERR_SHMSIZE) => StoreError::Full(text),
            Code::Sqlite(SQLITE_IOERR) => StoreError::Broken(text),
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
            Code::Sqlite(_) => true,
            // The connection went down (08, 57), or completion is unknown (40003).
            Code::Postgres(state) => !(state.starts_with("08") || state.starts_with("57") || state == "40003"),
        },
        _ => false,
    };
    if refused { of(error) } else { StoreError::Unknown(error.to_string()) }
}

/// An error of a statement that is a transaction of its own. `Ok`: a rule refused it, and nothing has happened.
pub(super) fn of_whole(error: sqlx::Error) -> Result<(), StoreError> {
    match &error {
        sqlx::Error::Database(db) if is_refusal(db.as_ref()) => Ok(()),
        // It was told to stop, before its end: whatever is said of a commit.
        sqlx::Error::Database(db) if matches!(code(db.as_ref()), Code::Postgres(state) if state == "57014") => {
            Err(of(error))
        }
        _ => Err(of_commit(error)),
    }
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

/// A read, or a statement that may be said again.
pub(super) async fn asked<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    within(limits::STORE_READ_MS, StoreError::Unavailable, async { work.await.map_err(of) }).await
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::error::Error;
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Says(&'static str);

    impl fmt::Display for Says {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("said")
        }
    }
    impl Error for Says {}
    impl DatabaseError for Says {
        fn message(&self) -> &str {
            "said"
        }
        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }
        fn as_error(&self) -> &(dyn Error + Send + Sync + 'static) {
            self
        }
        fn as_error_mut(&mut self) -> &mut (dyn Error + Send + Sync + 'static) {
            self
        }
        fn into_error(self: Box<Self>) -> Box<dyn Error + Send + Sync + 'static> {
            self
        }
        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    fn error(code: &'static str) -> sqlx::Error {
        sqlx::Error::Database(Box::new(Says(code)))
    }

    fn word(error: &StoreError) -> &'static str {
        match error {
            StoreError::Unavailable(_) => "unavailable",
            StoreError::Unknown(_) => "unknown",
            StoreError::Full(_) => "full",
            StoreError::Broken(_) => "broken",
            StoreError::Corrupt { .. } => "corrupt",
        }
    }

    #[test]
    fn each_code_has_its_meaning_before_and_during_the_commit() {
        for (code, before, during) in [
            // SQLite: busy, I/O (write, fsync), no room for the log's index, corrupt, full, not a database.
            ("5", "unavailable", "unavailable"),
            ("778", "broken", "broken"),
            ("1034", "broken", "broken"),
            ("4874", "full", "full"),
            ("11", "corrupt", "corrupt"),
            ("13", "full", "full"),
            ("26", "corrupt", "corrupt"),
            // Postgres: deadlock, disk full, damaged page, connection lost, shut down, completion unknown.
            ("40P01", "unavailable", "unavailable"),
            ("53100", "full", "full"),
            ("XX001", "corrupt", "corrupt"),
            ("08006", "unavailable", "unknown"),
            ("57P01", "unavailable", "unknown"),
            ("40003", "unavailable", "unknown"),
        ] {
            assert_eq!(word(&of(error(code))), before, "{code}");
            assert_eq!(word(&of_commit(error(code))), during, "{code} during the commit");
        }
        assert_eq!(word(&of_commit(sqlx::Error::WorkerCrashed)), "unknown");
        assert_eq!(word(&of(sqlx::Error::PoolTimedOut)), "unavailable");
    }

    #[test]
    fn a_refused_row_concerns_its_group_alone() {
        for code in ["19", "275", "18", "22021", "23514"] {
            assert!(matches!(Fault::from(error(code)), Fault::Refused(_)), "{code}");
        }
        for code in ["13", "5", "53100", "40P01"] {
            assert!(matches!(Fault::from(error(code)), Fault::Store(_)), "{code}");
        }
    }

    #[tokio::test]
    async fn a_silent_database_is_not_waited_for() {
        let late = within(5, StoreError::Unknown, std::future::pending::<Result<(), _>>()).await;
        assert!(matches!(late, Err(StoreError::Unknown(_))), "{late:?}");
    }
}
