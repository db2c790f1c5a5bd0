//! What a farm keeps its state and its bytes in: files, or with `ALLOY_TEST_BACKEND=shared` a Postgres and a bucket.

use std::path::Path;

use anyhow::{Result, bail};

use super::Setup;
use crate::pg;
use crate::s3::S3;

/// The bucket of a farm that has one, and what its orchestrator is told.
pub(super) async fn of(setup: &Setup) -> Result<(Option<S3>, Vec<(String, String)>)> {
    let own = setup.orchestrator_env.clone();
    let on_files = setup.cuts.is_some() || setup.farm_disk_mib.is_some();
    match std::env::var("ALLOY_TEST_BACKEND").as_deref() {
        // Whoever says where it shall be means that.
        Ok("shared") if own.is_empty() && !on_files => {
            let s3 = S3::start().await?;
            let mut env = s3.env("farm");
            env.push(("DATABASE_MODE".to_owned(), "postgres".to_owned()));
            env.push(("DATABASE_URL".to_owned(), pg::database().await));
            Ok((Some(s3), env))
        }
        Ok("shared" | "files") | Err(_) => Ok((None, own)),
        Ok(other) => bail!("ALLOY_TEST_BACKEND is files or shared, not {other}"),
    }
}

/// The same with nothing in it: a farm on files has lost its directory, another one has a database and a bucket's prefix of its own.
pub(super) async fn emptied(farm_dir: &Path, mut env: Vec<(String, String)>) -> Result<Vec<(String, String)>> {
    std::fs::remove_dir_all(farm_dir)?;
    if let Some((_, url)) = env.iter_mut().find(|(name, _)| name == "DATABASE_URL") {
        *url = pg::database().await;
    }
    if let Some((_, url)) = env.iter_mut().find(|(name, _)| name == "ALLOY_S3_URL") {
        url.push_str("/next");
    }
    Ok(env)
}
