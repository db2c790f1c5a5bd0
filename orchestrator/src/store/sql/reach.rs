//! S: connections to a Postgres, and in words for people why there is none.

use std::io::ErrorKind;
use std::str::FromStr;
use std::time::Duration;

use alloy_shared::limits;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions as _, Connection as _};

use super::open::OpenError;
use super::shared::BACKEND;
use super::target::WITHOUT_LIMITS;

/// Where Supabase has one.
const TRANSACTION_POOLER: u16 = 6543;

/// Texts per connection that stay prepared: every one that there is, and the chains that are common.
pub(super) const PREPARED: usize = 256;

fn parse(url: &str) -> Result<PgConnectOptions, OpenError> {
    PgConnectOptions::from_str(url).map_err(|error| match error {
        sqlx::Error::Configuration(why) => OpenError::Url(why.to_string()),
        error => OpenError::Url(error.to_string()),
    })
}

/// Says nothing at connecting that a pooler would refuse.
pub(super) fn address(url: &str) -> Result<PgConnectOptions, OpenError> {
    let options = parse(url)?;
    if options.get_port() == TRANSACTION_POOLER {
        return Err(OpenError::TransactionPooler);
    }
    Ok(options.extra_float_digits(None))
}

/// One connection. Who listens there and says nothing is not waited for without end.
pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, OpenError> {
    connect_within(options, Duration::from_millis(limits::STORE_OPEN_MS)).await
}

async fn connect_within(options: &PgConnectOptions, wait: Duration) -> Result<PgConnection, OpenError> {
    match tokio::time::timeout(wait, options.connect()).await {
        Ok(made) => made.map_err(|error| told(options, error)),
        Err(_) => Err(OpenError::Postgres {
            at: shown(options),
            why: format!("no answer within {wait:?}"),
            hint: "is it a Postgres, and does it take connections? psql with the same address tells more",
        }),
    }
}

/// One connection without limits, an orchestrator's or the server's own: what is copied over it takes hours, and stands in one
/// transaction meanwhile. To a database that has its schema.
pub(super) async fn plain_postgres(url: &str) -> Result<PgConnection, OpenError> {
    let options =
        address(url)?.application_name("alloy").statement_cache_capacity(PREPARED).disable_statement_logging();
    let mut conn = connect(&options).await?;
    // Not at connecting: poolers refuse most of what may be said there.
    sqlx::query(WITHOUT_LIMITS).execute(&mut conn).await.map_err(|error| told(&options, error))?;
    Ok(conn)
}

/// A database's address as people may see it.
pub fn shown_address(url: &str) -> Result<String, OpenError> {
    Ok(shown(&parse(url)?))
}

fn shown(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_default();
    match options.get_socket() {
        Some(socket) => format!("postgres:///{database}?host={}", socket.display()),
        None => format!("postgres://{}:{}/{database}", options.get_host(), options.get_port()),
    }
}

/// What went wrong at this address, and what to do about it.
pub(super) fn told(options: &PgConnectOptions, error: sqlx::Error) -> OpenError {
    OpenError::Postgres { at: shown(options), why: said(&error), hint: hint(&error) }
}

/// An error in the words of the database or the system, without the place in their source.
pub(super) fn said(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(db) => db.message().to_owned(),
        sqlx::Error::Io(error) => error.to_string(),
        error => error.to_string(),
    }
}

const TLS: &str =
    "sslmode and sslrootcert at the end of its address say how it is encrypted, and whose certificate is trusted";

fn hint(error: &sqlx::Error) -> &'static str {
    match error {
        sqlx::Error::Database(db) => hint_of(db.code().as_deref().unwrap_or_default()),
        sqlx::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => {
            "is it running, and are the host and the port right?"
        }
        sqlx::Error::Io(error) if error.kind() == ErrorKind::InvalidData => TLS,
        sqlx::Error::Tls(_) => TLS,
        _ => "psql with the same address tells more",
    }
}

/// By SQLSTATE.
fn hint_of(code: &str) -> &'static str {
    match code {
        "28P01" | "28000" => {
            "are the user and the password right? A password is percent-encoded in an address: %23 for #, %2F for /, %3F for ?, \
             %40 for @"
        }
        "3D000" => "make it first: CREATE DATABASE with the farm's user as its owner",
        "42501" => {
            "the farm's user must own the database, or: GRANT CREATE ON DATABASE and GRANT CREATE ON SCHEMA public TO that user"
        }
        "42P07" | "42710" => "it holds tables of something else; a farm needs a database of its own",
        "53300" => {
            "it has no room for more connections: raise max_connections, or let a pooler in session mode share them"
        }
        _ => "psql with the same address tells more",
    }
}

/// A pooler in transaction mode gives a connection's next transaction to whichever server connection is free: two
/// transactions that overlap and end in another order than they began show that.
pub(super) async fn refuse_pooling(options: &PgConnectOptions) -> Result<(), OpenError> {
    let options = options.clone().statement_cache_capacity(0).disable_statement_logging();
    let (one, other) = (connect(&options).await?, connect(&options).await?);
    match is_pooled(one, other).await {
        Ok(false) => Ok(()),
        Ok(true) => Err(OpenError::PooledByTransaction),
        Err(error) => Err(told(&options, error)),
    }
}

async fn is_pooled(mut one: PgConnection, mut other: PgConnection) -> Result<bool, sqlx::Error> {
    let wait = Duration::from_millis(limits::STORE_READ_MS);
    for _ in 0..3 {
        let mut first = one.begin().await?;
        let before = backend(&mut first).await?;
        // A pooler with one server connection lets this one wait.
        let Ok(second) = tokio::time::timeout(wait, other.begin()).await else { return Ok(true) };
        let mut second = second?;
        backend(&mut second).await?;
        first.rollback().await?;
        second.rollback().await?;
        let mut again = one.begin().await?;
        let after = backend(&mut again).await?;
        again.rollback().await?;
        if before != after {
            return Ok(true);
        }
    }
    one.close().await?;
    other.close().await?;
    Ok(false)
}

async fn backend(conn: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar(BACKEND).persistent(false).fetch_one(conn).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_cannot_be_read_says_how_a_password_is_written() {
        for url in ["postgres://u:se#kret@host/d", "postgres://u:p@host:99999/d", "host"] {
            let said = address(url).unwrap_err().to_string();
            assert!(said.contains("%23 for #") && !said.contains("kret"), "{url}: {said}");
        }
        let pooler = address("postgres://u:p@host:6543/d");
        assert!(matches!(pooler, Err(OpenError::TransactionPooler)), "{pooler:?}");
    }

    #[tokio::test]
    async fn whoever_cannot_be_reached_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let said = plain_postgres(&format!("postgres://u:secret@127.0.0.1:{port}/farm")).await.unwrap_err().to_string();
        let wanted = format!("the database at postgres://127.0.0.1:{port}/farm: Connection refused");
        assert!(said.starts_with(&wanted) && said.ends_with("right?") && !said.contains("secret"), "{said}");
    }

    #[tokio::test]
    async fn whoever_takes_a_connection_and_says_nothing_is_given_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://u@{}/farm?sslmode=disable", listener.local_addr().unwrap());
        let wait = Duration::from_millis(20);
        let said = connect_within(&address(&url).unwrap(), wait).await.unwrap_err().to_string();
        assert!(said.contains("no answer within 20ms; is it a Postgres"), "{said}");
    }
}
