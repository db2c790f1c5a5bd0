//! S: a commit's groups in their order. Neighbours that change one job each, and different ones, are written together,
//! statement by statement; whatever is rare or goes wrong is written group by group, each in a savepoint.

use std::collections::HashSet;

use alloy_shared::limits;

use super::conn::{Args, Conn};
use super::fault::{Fault, of};
use super::{blob, farm, job};
use crate::store::{Committed, Group, Miss, StoreError, Write};

super::statements! {
    SAVEPOINT = "SAVEPOINT alloy";
    ROLLBACK = "ROLLBACK TO SAVEPOINT alloy";
    RELEASE = "RELEASE SAVEPOINT alloy";
}

/// Returns what each group did, and whether the transaction is worth keeping.
pub(super) async fn run(conn: &mut Conn<'_>, groups: &[Group]) -> Result<(Committed, bool), StoreError> {
    let mut done = Vec::with_capacity(groups.len());
    if let [group] = groups {
        // The transaction is its savepoint.
        let result = alone(conn, group).await?;
        let keep = result.is_ok();
        return Ok((Committed { groups: vec![result] }, keep));
    }
    let mut rest = groups;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(alike(rest).max(1));
        rest = later;
        let together = now.len() > 1 && {
            run_plain(conn, SAVEPOINT).await?;
            let writes: Vec<&Write> = now.iter().flat_map(|group| &group.0).collect();
            let all = match job::write(conn, &writes).await {
                Ok(all) => all,
                Err(Fault::Refused(_)) => false,
                Err(Fault::Store(error)) => return Err(error),
            };
            if !all {
                run_plain(conn, ROLLBACK).await?;
            }
            run_plain(conn, RELEASE).await?;
            all
        };
        for group in now {
            done.push(match together {
                true => Ok(group.0.iter().map(number).collect()),
                false => in_savepoint(conn, group).await?,
            });
        }
    }
    Ok((Committed { groups: done }, true))
}

/// How many groups from the front may be written together: in any order they would do the same.
fn alike(groups: &[Group]) -> usize {
    let mut jobs = HashSet::new();
    let mut keys = HashSet::new();
    let first = groups.iter().take(limits::COMMIT_TOGETHER_MAX);
    let differing = first.take_while(|group| match group.0.as_slice() {
        [Write::InsertJob(insert)] => {
            let key = insert.key.as_ref();
            jobs.insert(insert.job.id) && key.is_none_or(|key| keys.insert((key.org, &*key.caller, &*key.key)))
        }
        [Write::Advance(advance)] => jobs.insert(advance.next.id),
        [Write::CloseAttempt(close)] => jobs.insert(close.at.job),
        _ => false,
    });
    differing.count()
}

async fn in_savepoint(conn: &mut Conn<'_>, group: &Group) -> Result<Result<Vec<i64>, Miss>, StoreError> {
    run_plain(conn, SAVEPOINT).await?;
    let result = alone(conn, group).await?;
    if result.is_err() {
        run_plain(conn, ROLLBACK).await?;
    }
    run_plain(conn, RELEASE).await?;
    Ok(result)
}

/// Writes one group up to its first miss. What it wrote until then is for the caller to undo.
async fn alone(conn: &mut Conn<'_>, group: &Group) -> Result<Result<Vec<i64>, Miss>, StoreError> {
    let mut numbers = Vec::with_capacity(group.0.len());
    for write in &group.0 {
        match one(conn, write).await {
            Ok(Ok(number)) => numbers.push(number),
            Ok(Err(miss)) => return Ok(Err(miss)),
            Err(Fault::Refused(why)) => return Ok(Err(Miss::Corrupt(why))),
            Err(Fault::Store(error)) => return Err(error),
        }
    }
    Ok(Ok(numbers))
}

async fn one(conn: &mut Conn<'_>, write: &Write) -> Result<Result<i64, Miss>, Fault> {
    let hit = match write {
        Write::InsertJob(insert) => {
            return Ok(job::insert(conn, insert).await?.map_or(Ok(number(write)), Err));
        }
        Write::Advance(_) | Write::CloseAttempt(_) => job::write(conn, &[write]).await?,
        Write::OpenSession(open) => return farm::open_session(conn, open).await,
        Write::Enrol(enrol) => farm::enrol(conn, enrol).await?,
        Write::SetWorker(set) => farm::set_worker(conn, set).await?,
        Write::Seen { worker, at } => farm::seen(conn, worker, *at).await?,
        Write::AddToken(token) => farm::add_token(conn, token).await?,
        Write::RevokeToken { org, id, at } => farm::revoke_token(conn, org, id, *at).await?,
        Write::AddBlobs(blobs) => blob::add(conn, blobs).await?,
        Write::AddMeta { name, value } => blob::add_meta(conn, name, value).await?,
    };
    Ok(if hit { Ok(number(write)) } else { Err(Miss::Stale) })
}

/// The new number of the row of a write that hit.
fn number(write: &Write) -> i64 {
    match write {
        Write::InsertJob(insert) => insert.job.version,
        Write::Advance(advance) => advance.next.version,
        Write::CloseAttempt(_)
        | Write::Enrol(_)
        | Write::SetWorker(_)
        | Write::OpenSession(_)
        | Write::Seen { .. }
        | Write::AddToken(_)
        | Write::RevokeToken { .. }
        | Write::AddBlobs(_)
        | Write::AddMeta { .. } => 0,
    }
}

async fn run_plain(conn: &mut Conn<'_>, text: &'static str) -> Result<(), StoreError> {
    conn.run(text, Args::new()).await.map_err(of)?;
    Ok(())
}
