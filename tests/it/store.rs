//! T: the store's conformance suite: SQLite, Postgres and the model do the same.

use std::sync::Arc;

use alloy_tests::pg;
use orchestrator::store::mem::MemStore;
use orchestrator::store::sql::SqlStore;
use orchestrator::store::{Group, Miss, Store, Write};

mod given;
pub(crate) mod migrations;
mod moved;
mod postgres;
mod read;
mod schema;
mod speed;
mod supabase;
mod tidy;
mod walk;
mod write;

/// The three stores, all empty.
struct Stores {
    all: [(&'static str, Arc<dyn Store>); 3],
    sqlite: std::path::PathBuf,
    postgres: String,
    _dir: tempfile::TempDir,
}

async fn stores() -> Stores {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = dir.path().join("farm.db");
    let postgres = pg::database().await;
    let all: [(&'static str, Arc<dyn Store>); 3] = [
        ("memory", Arc::new(MemStore::default())),
        ("sqlite", Arc::new(SqlStore::open_sqlite(&sqlite).await.unwrap())),
        ("postgres", Arc::new(SqlStore::open_postgres(&postgres).await.unwrap())),
    ];
    Stores { all, sqlite, postgres, _dir: dir }
}

/// Runs one check on each store. The name of the store is printed, and shown when the check fails.
async fn on_each(check: impl AsyncFn(&dyn Store)) {
    for (name, store) in &stores().await.all {
        println!("on {name}");
        check(&**store).await;
    }
}

/// Commits one group of one write.
async fn put(store: &dyn Store, write: Write) -> Result<i64, Miss> {
    let mut done = store.commit(&[Group(vec![write])]).await.unwrap();
    assert_eq!(done.groups.len(), 1);
    done.groups.remove(0).map(|numbers| {
        assert_eq!(numbers.len(), 1);
        numbers[0]
    })
}
