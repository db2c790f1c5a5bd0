//! S: either engine behind one face: arguments in, rows out, and texts that take many rows at once.

use std::str::FromStr;

use alloy_shared::env::Ms;
use serde::de::DeserializeOwned;
use sha2::Digest as _;
use sqlx::postgres::{PgArguments, PgConnection, PgPool, PgRow};
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqlitePool, SqliteRow};
use sqlx::{Arguments, Row as _};

use super::wide::{Chain, Ending, GUARDS, LINKS, Wide};
use crate::store::StoreError;

#[derive(Debug)]
pub(super) enum Db {
    /// One connection writes, several read.
    Sqlite {
        write: SqlitePool,
        read: SqlitePool,
    },
    Postgres(PgPool),
}

/// The same code inside a transaction of either engine. SQLite takes the write lock at once: a read lock that is raised
/// later fails instead of waiting. `$body` gives the value and whether to keep what was done. A connection whose transaction
/// failed is not used again: SQLite ends some of them by itself (a full disk), and the driver then counts wrong.
macro_rules! tx {
    ($db:expr, |$conn:ident| $body:expr) => {
        match $db {
            Db::Sqlite { write, .. } => {
                let mut own = write.acquire().await.map_err(fault::of)?;
                let done: Result<_, StoreError> = async {
                    let mut tx = own.begin_with("BEGIN IMMEDIATE").await.map_err(fault::of)?;
                    let mut $conn = Conn::Sqlite(&mut tx);
                    let (out, keep) = $body;
                    end!(tx, keep);
                    Ok(out)
                }
                .await;
                if done.is_err()
                    && let Err(error) = own.close().await
                {
                    tracing::debug!(%error, "a connection whose transaction failed did not close in order");
                }
                done
            }
            Db::Postgres(pool) => {
                let mut tx = pool.begin().await.map_err(fault::of)?;
                let mut $conn = Conn::Postgres(&mut tx);
                let (out, keep) = $body;
                end!(tx, keep);
                Ok(out)
            }
        }
    };
}

macro_rules! end {
    ($tx:ident, $keep:ident) => {
        if $keep { $tx.commit().await.map_err(fault::of_commit)? } else { $tx.rollback().await.map_err(fault::of)? }
    };
}

pub(super) use {end, tx};

/// A connection inside a transaction.
pub(super) enum Conn<'a> {
    Sqlite(&'a mut SqliteConnection),
    Postgres(&'a mut PgConnection),
}

impl Conn<'_> {
    /// Returns how many rows it touched.
    pub(super) async fn run(&mut self, text: &'static str, args: Args) -> Result<u64, sqlx::Error> {
        match self {
            Self::Sqlite(conn) => {
                Ok(sqlx::query_with(text, args.sqlite()?).execute(&mut **conn).await?.rows_affected())
            }
            Self::Postgres(conn) => {
                Ok(sqlx::query_with(text, args.postgres()?).execute(&mut **conn).await?.rows_affected())
            }
        }
    }

    pub(super) async fn first(&mut self, text: &'static str, args: Args) -> Result<Option<Row>, sqlx::Error> {
        match self {
            Self::Sqlite(conn) => Ok(sqlx::query_with(text, args.sqlite()?)
                .fetch_all(&mut **conn)
                .await?
                .into_iter()
                .next()
                .map(Row::Sqlite)),
            Self::Postgres(conn) => Ok(sqlx::query_with(text, args.postgres()?)
                .fetch_all(&mut **conn)
                .await?
                .into_iter()
                .next()
                .map(Row::Postgres)),
        }
    }

    /// Runs a text for all rows, in as few steps as the engine allows. Returns how many rows it touched.
    pub(super) async fn run_wide(&mut self, wide: &Wide, rows: Args) -> Result<u64, sqlx::Error> {
        let mut touched = 0;
        match self {
            Self::Sqlite(conn) => {
                for (text, args) in wide.split(rows) {
                    touched += sqlx::query_with(text, args.sqlite()?).execute(&mut **conn).await?.rows_affected();
                }
            }
            Self::Postgres(conn) => {
                if let Some((text, args)) = wide.whole(rows)? {
                    touched = sqlx::query_with(text, args).execute(&mut **conn).await?.rows_affected();
                }
            }
        }
        Ok(touched)
    }

    /// Runs all texts of a chain for their rows. Returns how many rows each of the guarded ones touched; where that is not
    /// `guarded` in all, the others have not run.
    pub(super) async fn run_chain(
        &mut self,
        chain: &Chain,
        rows: [Args; LINKS],
        guarded: u64,
    ) -> Result<[u64; GUARDS], sqlx::Error> {
        let mut touched = [0; GUARDS];
        match self {
            Self::Sqlite(_) => {
                for (at, (wide, rows)) in chain.links.iter().zip(rows).enumerate() {
                    if at == GUARDS && touched.iter().sum::<u64>() != guarded {
                        break;
                    }
                    let count = self.run_wide(wide, rows).await?;
                    if let Some(touched) = touched.get_mut(at) {
                        *touched = count;
                    }
                }
            }
            Self::Postgres(conn) => {
                let Some((text, args)) = chain.whole(rows, guarded, Ending::Count)? else { return Ok(touched) };
                let row = sqlx::query_with(text, args).fetch_one(&mut **conn).await?;
                for (at, touched) in touched.iter_mut().enumerate() {
                    *touched = row.try_get::<i64, _>(at)?.unsigned_abs();
                }
            }
        }
        Ok(touched)
    }
}

impl Db {
    pub(super) async fn rows(&self, text: &'static str, args: Args) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Self::Sqlite { read, .. } => {
                Ok(sqlx::query_with(text, args.sqlite()?).fetch_all(read).await?.into_iter().map(Row::Sqlite).collect())
            }
            Self::Postgres(pool) => Ok(sqlx::query_with(text, args.postgres()?)
                .fetch_all(pool)
                .await?
                .into_iter()
                .map(Row::Postgres)
                .collect()),
        }
    }

    pub(super) async fn rows_wide(&self, wide: &Wide, rows: Args) -> Result<Vec<Row>, sqlx::Error> {
        let mut found = Vec::new();
        match self {
            Self::Sqlite { read, .. } => {
                for (text, args) in wide.split(rows) {
                    let some = sqlx::query_with(text, args.sqlite()?).fetch_all(read).await?;
                    found.extend(some.into_iter().map(Row::Sqlite));
                }
            }
            Self::Postgres(pool) => {
                if let Some((text, args)) = wide.whole(rows)? {
                    let all = sqlx::query_with(text, args).fetch_all(pool).await?;
                    found.extend(all.into_iter().map(Row::Postgres));
                }
            }
        }
        Ok(found)
    }
}

/// What a text is given for `$1`, `$2`, …
#[derive(Debug, Default)]
pub(super) struct Args(pub(super) Vec<Arg>);

#[derive(Debug)]
pub(super) enum Arg {
    Text(Option<String>),
    Int(Option<i64>),
    Flag(Option<bool>),
}

impl Args {
    pub(super) fn new() -> Self {
        Self::default()
    }
    pub(super) fn text(self, value: impl ToString) -> Self {
        self.maybe_text(Some(value))
    }
    pub(super) fn maybe_text(mut self, value: Option<impl ToString>) -> Self {
        self.0.push(Arg::Text(value.map(|value| storable(value.to_string()))));
        self
    }
    pub(super) fn int(self, value: i64) -> Self {
        self.maybe_int(Some(value))
    }
    pub(super) fn maybe_int(mut self, value: Option<i64>) -> Self {
        self.0.push(Arg::Int(value));
        self
    }
    /// A size or count. What no BIGINT can hold becomes -1, which every CHECK of such a column refuses.
    pub(super) fn size(self, value: u64) -> Self {
        self.maybe_size(Some(value))
    }
    pub(super) fn maybe_size(self, value: Option<u64>) -> Self {
        self.maybe_int(value.map(|value| i64::try_from(value).unwrap_or(-1)))
    }
    pub(super) fn flag(self, value: bool) -> Self {
        self.maybe_flag(Some(value))
    }
    pub(super) fn maybe_flag(mut self, value: Option<bool>) -> Self {
        self.0.push(Arg::Flag(value));
        self
    }

    pub(super) fn append(&mut self, mut more: Self) {
        self.0.append(&mut more.0);
    }

    pub(super) fn first(mut self, count: usize) -> Self {
        self.0.truncate(count);
        self
    }

    /// Tells the first columns of a table's row from all others, whichever engine they were read from.
    pub(super) fn digest(&self, table: &str, columns: usize) -> [u8; 32] {
        let mut sha = sha2::Sha256::new();
        sha.update(table);
        for arg in self.0.iter().take(columns) {
            let (kind, bytes) = match arg {
                Arg::Text(Some(text)) => (b't', text.as_bytes()),
                Arg::Int(Some(value)) => (b'i', &value.to_le_bytes()[..]),
                Arg::Flag(Some(value)) => (b'f', &[u8::from(*value)][..]),
                Arg::Text(None) | Arg::Int(None) | Arg::Flag(None) => (b'-', &[][..]),
            };
            sha.update([kind]);
            sha.update((bytes.len() as u64).to_le_bytes());
            sha.update(bytes);
        }
        sha.finalize().into()
    }

    fn sqlite(self) -> Result<SqliteArguments, sqlx::Error> {
        fill(self)
    }
    fn postgres(self) -> Result<PgArguments, sqlx::Error> {
        fill(self)
    }
}

/// Postgres keeps no NUL in a text, so neither engine does.
fn storable(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

fn fill<A>(args: Args) -> Result<A, sqlx::Error>
where
    A: Arguments,
    Option<String>: for<'q> sqlx::Encode<'q, A::Database> + sqlx::Type<A::Database>,
    Option<i64>: for<'q> sqlx::Encode<'q, A::Database> + sqlx::Type<A::Database>,
    Option<bool>: for<'q> sqlx::Encode<'q, A::Database> + sqlx::Type<A::Database>,
{
    let mut out = A::default();
    out.reserve(args.0.len(), 0);
    for arg in args.0 {
        match arg {
            Arg::Text(value) => out.add(value),
            Arg::Int(value) => out.add(value),
            Arg::Flag(value) => out.add(value),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(out)
}

/// A row of either engine.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

macro_rules! column_at {
    ($($name:ident -> $type:ty;)+) => { impl Row { $(
        pub(super) fn $name(&self, index: usize) -> Result<Option<$type>, sqlx::Error> {
            match self {
                Row::Sqlite(row) => row.try_get(index),
                Row::Postgres(row) => row.try_get(index),
            }
        }
    )+ } };
}

column_at! {
    text_at -> String;
    int_at -> i64;
    flag_at -> bool;
}

/// Reads one row's columns, and says which one it was when that fails.
pub(super) struct Reader<'a> {
    row: &'a Row,
    table: &'static str,
    id: String,
}

macro_rules! column {
    ($($name:ident -> $type:ty;)+) => { $(
        pub(super) fn $name(&self, column: &'static str) -> Result<$type, StoreError> {
            match self.row {
                Row::Sqlite(row) => row.try_get(column),
                Row::Postgres(row) => row.try_get(column),
            }
            .map_err(|_| self.corrupt(column))
        }
    )+ };
}

impl<'a> Reader<'a> {
    /// `key` is the column that names the row when another one cannot be read.
    pub(super) fn new(row: &'a Row, table: &'static str, key: &'static str) -> Self {
        let unnamed = Self { row, table, id: String::new() };
        let id = unnamed.text(key).unwrap_or_default();
        Self { id, ..unnamed }
    }

    column! {
        text -> String;
        maybe_text -> Option<String>;
        int -> i64;
        maybe_int -> Option<i64>;
        flag -> bool;
    }

    pub(super) fn corrupt(&self, column: &'static str) -> StoreError {
        StoreError::Corrupt { table: self.table, id: self.id.clone(), column }
    }
    pub(super) fn ms(&self, column: &'static str) -> Result<Ms, StoreError> {
        self.int(column).map(Ms)
    }
    pub(super) fn maybe_ms(&self, column: &'static str) -> Result<Option<Ms>, StoreError> {
        Ok(self.maybe_int(column)?.map(Ms))
    }
    /// A number that is never negative, as narrow as its type.
    pub(super) fn size<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, StoreError> {
        T::try_from(self.int(column)?).map_err(|_| self.corrupt(column))
    }
    pub(super) fn maybe_size<T: TryFrom<i64>>(&self, column: &'static str) -> Result<Option<T>, StoreError> {
        self.maybe_int(column)?.map(|n| T::try_from(n).map_err(|_| self.corrupt(column))).transpose()
    }
    pub(super) fn parsed<T: FromStr>(&self, column: &'static str) -> Result<T, StoreError> {
        self.text(column)?.parse().map_err(|_| self.corrupt(column))
    }
    pub(super) fn maybe_parsed<T: FromStr>(&self, column: &'static str) -> Result<Option<T>, StoreError> {
        self.maybe_text(column)?.map(|text| text.parse().map_err(|_| self.corrupt(column))).transpose()
    }
    pub(super) fn json<T: DeserializeOwned>(&self, column: &'static str) -> Result<T, StoreError> {
        serde_json::from_str(&self.text(column)?).map_err(|_| self.corrupt(column))
    }
    pub(super) fn maybe_json<T: DeserializeOwned>(&self, column: &'static str) -> Result<Option<T>, StoreError> {
        let text = self.maybe_text(column)?;
        text.map(|text| serde_json::from_str(&text).map_err(|_| self.corrupt(column))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nul_never_reaches_an_engine() {
        let args = Args::new().text("a\0b");
        assert!(matches!(&args.0[0], Arg::Text(Some(text)) if text == "a\u{fffd}b"));
    }
}
